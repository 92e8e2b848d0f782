// Merge maps: which patches of a window share a token, and where they are in the picture.

const TINTS = { 2: [60, 130, 220], 3: [60, 190, 130], 4: [245, 190, 60] }; // by patches of a token; 4 is for more too
const TINT = 0.4;

export class Tokens {
  constructor({ frame, window_size: size, patch_size: patch, windows }, numMerges) {
    [this.frameHeight, this.frameWidth] = frame;
    this.patch = patch;
    this.grid = Math.ceil(size / patch);
    this.rows = cuts(windows.map((w) => w.top), size, this.frameHeight);
    this.columns = cuts(windows.map((w) => w.left), size, this.frameWidth);
    const unmerged = Uint16Array.from({ length: this.grid ** 2 }, (_, i) => i);
    this.maps = windows.map(({ maps }) => [unmerged, ...maps.map(decode)]);
    for (const maps of this.maps) while (maps.length <= numMerges) maps.push(maps[maps.length - 1]);
  }

  // The window and the patch at a place, both in 0..1.
  at(u, v) {
    const row = place(this.rows, v * this.frameHeight);
    const column = place(this.columns, u * this.frameWidth);
    const down = Math.floor((v * this.frameHeight - this.rows[row].origin) / this.patch);
    const across = Math.floor((u * this.frameWidth - this.columns[column].origin) / this.patch);
    const last = this.grid - 1;
    return {
      window: row * this.columns.length + column,
      patch: clamp(down, last) * this.grid + clamp(across, last),
    };
  }

  // Patches that share the token of one, after so many merges.
  group({ window, patch }, step) {
    const map = this.maps[window][step];
    return [...map.keys()].filter((i) => map[i] === map[patch]);
  }

  // The part of a patch that is seen, in pixels of a canvas; of overlapping windows the nearer one counts.
  box(window, patch, width, height) {
    const row = this.rows[Math.floor(window / this.columns.length)];
    const column = this.columns[window % this.columns.length];
    const [top, bottom] = span(row, Math.floor(patch / this.grid), this.patch, height / this.frameHeight);
    const [left, right] = span(column, patch % this.grid, this.patch, width / this.frameWidth);
    return right > left && bottom > top ? [left, top, right - left, bottom - top] : null;
  }

  // Draw merged patches in one flat colour, tinted by their number, and the borders of tokens.
  draw(context, picture, step) {
    const { width, height } = context.canvas;
    const means = this.means(picture);
    context.clearRect(0, 0, width, height);
    const borders = new Path2D();
    this.maps.forEach((maps, window) => {
      const map = maps[step];
      const groups = new Map();
      map.forEach((token, patch) => {
        const mean = means(window, patch);
        const group = groups.get(token) ?? [0, 0, 0, 0, 0];
        groups.set(token, group);
        group[4]++;
        if (mean) mean.forEach((value, i) => (group[i] += value));
      });
      map.forEach((token, patch) => {
        const box = this.box(window, patch, width, height);
        if (!box) return;
        const [left, top, across, down] = box;
        const [red, green, blue, pixels, patches] = groups.get(token);
        if (patches > 1) {
          const tint = TINTS[Math.min(patches, 4)];
          const mixed = [red, green, blue].map((sum, i) => (1 - TINT) * (sum / pixels) + TINT * tint[i]);
          context.fillStyle = `rgb(${mixed.map(Math.round).join(" ")})`;
          context.fillRect(left, top, across, down);
        }
        if (patch % this.grid === 0 || map[patch - 1] !== token) {
          borders.moveTo(left, top);
          borders.lineTo(left, top + down);
        }
        if (patch < this.grid || map[patch - this.grid] !== token) {
          borders.moveTo(left, top);
          borders.lineTo(left + across, top);
        }
      });
    });
    context.strokeStyle = "rgb(0 0 0 / 0.28)";
    context.lineWidth = Math.max(1, width / 1400);
    context.stroke(borders);
  }

  // Sums of a patch's colours and its pixels, from a copy in which a patch is four pixels wide.
  means(picture) {
    const scale = 4 / this.patch;
    const small = new OffscreenCanvas(Math.ceil(this.frameWidth * scale), Math.ceil(this.frameHeight * scale));
    const context = small.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0, small.width, small.height);
    const { data } = context.getImageData(0, 0, small.width, small.height);
    return (window, patch) => {
      const box = this.box(window, patch, small.width, small.height);
      if (!box) return null;
      const [left, top, across, down] = box.map(Math.round);
      const sums = [0, 0, 0, 0];
      for (let y = top; y < Math.min(top + Math.max(1, down), small.height); y++) {
        for (let x = left; x < Math.min(left + Math.max(1, across), small.width); x++) {
          const i = 4 * (y * small.width + x);
          for (let c = 0; c < 3; c++) sums[c] += data[i + c];
          sums[3]++;
        }
      }
      return sums;
    };
  }
}

// Of windows along one side: where each begins, and from where to where it is the nearest one.
function cuts(origins, size, length) {
  const own = [...new Set(origins)].sort((a, b) => a - b);
  const middle = (i) => (own[i] + size + own[i + 1]) / 2;
  return own.map((origin, i) => ({
    origin,
    start: i ? middle(i - 1) : 0,
    stop: i + 1 < own.length ? middle(i) : length,
  }));
}

function place(cut, position) {
  return Math.max(0, cut.findLastIndex(({ start }) => start <= position));
}

function span({ origin, start, stop }, i, patch, scale) {
  return [Math.max(origin + i * patch, start) * scale, Math.min(origin + (i + 1) * patch, stop) * scale];
}

function clamp(value, last) {
  return Math.min(last, Math.max(0, value));
}

function decode(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}
