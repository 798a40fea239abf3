"""Networks and blocks that are here to learn from; delete this folder, tests/tutorials and docs/tour.md together."""

from lit_nn.nets.tutorials.conv3d_cnn import Conv3dCNN as Conv3dCNN
from lit_nn.nets.tutorials.fixed_hidden import FixedHidden as FixedHidden
from lit_nn.nets.tutorials.lazy_cnn import LazyCNN as LazyCNN
from lit_nn.nets.tutorials.nested_mlp import NestedMLP as NestedMLP
