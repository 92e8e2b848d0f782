// Masks: class ids of every pixel, column by column as COCO counts them.

export class Labels {
  constructor({ height, width, classes }, numClasses) {
    this.height = height;
    this.width = width;
    this.ids = new (numClasses > 256 ? Uint16Array : Uint8Array)(height * width);
    for (const { id, rle } of classes) {
      let start = 0;
      runs(rle.counts).forEach((length, i) => {
        if (i % 2) this.ids.fill(id, start, start + length);
        start += length;
      });
    }
  }

  // The id at a place, both in 0..1.
  at(u, v) {
    return this.ids[index(u, this.width) * this.height + index(v, this.height)];
  }

  // The share of pixels that have the same class in both.
  agreement(other) {
    let equal = 0;
    for (let i = 0; i < this.ids.length; i++) equal += this.ids[i] === other.ids[i];
    return equal / this.ids.length;
  }

  // ImageData of a size, whose pixels are `colour(i)`, as 32 bits ABGR, of the label's place in `ids`.
  paint(width, height, colour) {
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const rows = Int32Array.from({ length: height }, (_, y) => index((y + 0.5) / height, this.height));
    for (let x = 0; x < width; x++) {
      const column = index((x + 0.5) / width, this.width) * this.height;
      for (let y = 0; y < height; y++) pixels[y * width + x] = colour(column + rows[y]);
    }
    return image;
  }
}

export function abgr([red, green, blue], alpha) {
  return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

function index(share, size) {
  return Math.min(size - 1, Math.max(0, Math.floor(share * size)));
}

// COCO's compressed string: five bits a character, differences to the run before the last from the fourth on.
function runs(text) {
  const found = [];
  for (let i = 0; i < text.length; ) {
    let value = 0;
    let shift = 0;
    let bits;
    do {
      bits = text.charCodeAt(i++) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift;
    found.push(found.length > 2 ? value + found[found.length - 2] : value);
  }
  return found;
}
