// Classify image files of any size with an exported model, knowing nothing but the .onnx file.
//
//   npm install --prefix tests/node
//   node tests/node/classify.cjs model.onnx IMAGE...
//
// The images are only decoded: upright, on white, gray or RGB. The model itself brings them to its size.
// Prints a JSON list with a label and its probability for each image.

const fs = require("node:fs");
const ort = require("onnxruntime-web");
const sharp = require("sharp");

// The metadata of an ONNX file, which onnxruntime-web does not give access to: field 14 of the protobuf message
// ModelProto, pairs of a key (field 1) and a value (field 2); see onnx.proto.
function readMetadata(bytes) {
  const metadata = {};
  for (const [field, entry] of fields(bytes)) {
    if (field === 14) {
      const pair = Object.fromEntries(fields(entry));
      metadata[Buffer.from(pair[1]).toString()] = Buffer.from(pair[2]).toString();
    }
  }
  return metadata;
}

// Number and content of each field of a protobuf message; of numbers only the place is needed.
function* fields(bytes) {
  let place = 0;
  const number = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = bytes[place++];
      value += (byte % 128) * factor;
      if (byte < 128) return value;
    }
  };
  while (place < bytes.length) {
    const tag = number();
    const field = Math.floor(tag / 8);
    if (tag % 8 === 0) number();
    else if (tag % 8 === 1) place += 8;
    else if (tag % 8 === 5) place += 4;
    else {
      const length = number();
      yield [field, bytes.subarray(place, place + length)];
      place += length;
    }
  }
}

// A file as the model takes it: bytes 0..255 in the order channels, rows, columns; gray with the weights of ITU-R 601.
async function decode(path, channels) {
  const image = sharp(path).rotate().flatten({ background: "white" }).toColourspace("srgb").removeAlpha().raw();
  const { data, info } = await image.toBuffer({ resolveWithObject: true });
  const size = info.width * info.height;
  const pixels = new Uint8Array(channels * size);
  for (let place = 0; place < size; place++) {
    const at = (channel) => data[info.channels * place + Math.min(channel, info.channels - 1)];
    if (channels === 3) for (let channel = 0; channel < 3; channel++) pixels[channel * size + place] = at(channel);
    else pixels[place] = (at(0) * 19595 + at(1) * 38470 + at(2) * 7471 + 0x8000) >> 16;
  }
  return new ort.Tensor("uint8", pixels, [1, channels, info.height, info.width]);
}

async function main(modelPath, ...imagePaths) {
  const model = fs.readFileSync(modelPath);
  const metadata = readMetadata(model);
  const classNames = JSON.parse(metadata.class_names);
  const [channels] = JSON.parse(metadata.image_shape);

  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(model);
  const labels = [];
  for (const path of imagePaths) {
    const answer = await session.run({ pixels: await decode(path, channels) });
    const row = answer.probabilities.data;
    const best = row.indexOf(Math.max(...row));
    labels.push({ label: classNames[best], probability: row[best] });
  }
  console.log(JSON.stringify(labels));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
});
