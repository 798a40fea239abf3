"""How image files become a data set: decoding, cache, parts. Machinery; `decode` needs neither torch nor Lightning."""
