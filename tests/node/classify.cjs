// Classify raw pixels with an exported model, knowing nothing but the .onnx file.
//
//   npm install --prefix tests/node
//   node tests/node/classify.cjs model.onnx pixels.bin
//
// pixels.bin holds images one after the other: bytes 0..255 in the order channels, rows, columns.
// Prints a JSON list with a label and its probability for each image.

const fs = require("node:fs");
const ort = require("onnxruntime-web");

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

async function main(modelPath, pixelsPath) {
  const model = fs.readFileSync(modelPath);
  const metadata = readMetadata(model);
  const classNames = JSON.parse(metadata.class_names);
  const shape = JSON.parse(metadata.image_shape); // channels, height, width
  const pixels = new Uint8Array(fs.readFileSync(pixelsPath));
  const count = pixels.length / shape.reduce((a, b) => a * b);

  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(model);
  const answer = await session.run({ pixels: new ort.Tensor("uint8", pixels, [count, ...shape]) });
  const probabilities = answer.probabilities.data; // count * classes
  const labels = [];
  for (let image = 0; image < count; image++) {
    const row = probabilities.subarray(image * classNames.length, (image + 1) * classNames.length);
    const best = row.indexOf(Math.max(...row));
    labels.push({ label: classNames[best], probability: row[best] });
  }
  console.log(JSON.stringify(labels));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
});
