// The picture with what is shown over it: a mask that a slider fades, tokens, or what merging changed.

import { abgr } from "./labels.js";

const LONGEST = 1600; // pixels of a side that are drawn
const DARK = abgr([8, 12, 20], 165);
const CHANGED = abgr([255, 0, 110], 235);

export class View {
  constructor(told) {
    this.told = told; // called with what the pointer or the arrow keys are on
    this.picture = document.getElementById("picture");
    [this.base, this.mask, this.top] = ["base", "mask", "top"].map((id) => {
      return document.getElementById(id).getContext("2d", { willReadFrequently: id === "base" });
    });
    this.state = null;
    this.kind = "classes";
    this.step = 0;
    this.lit = null; // the class that is lit up
    this.cursor = null;
    this.picture.addEventListener("pointermove", (event) => this.point(event));
    this.picture.addEventListener("pointerdown", (event) => this.point(event));
    this.picture.addEventListener("pointerleave", ({ pointerType }) => {
      if (pointerType === "mouse") this.leave();
    });
    this.picture.addEventListener("keydown", (event) => this.move(event));
    this.picture.addEventListener("blur", () => this.leave());
  }

  // A picture of a size, as the browser reads it; null if it can't.
  open(bitmap, width, height) {
    const scale = Math.min(1, LONGEST / Math.max(width, height));
    this.size = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
    for (const context of [this.base, this.mask, this.top]) [context.canvas.width, context.canvas.height] = this.size;
    this.picture.style.setProperty("--ratio", width / height);
    this.base.fillStyle = "#9aa3af";
    this.base.fillRect(0, 0, ...this.size);
    if (bitmap) this.base.drawImage(bitmap, 0, 0, ...this.size);
    this.state = null;
    this.cursor = null;
    this.picture.hidden = false;
  }

  // What is known of it: labels, tokens, colours of the classes, and labels without merging or null.
  show(state) {
    this.state = state;
    this.draw();
  }

  set(changes) {
    Object.assign(this, changes);
    this.draw();
  }

  draw() {
    const { state } = this;
    this.top.clearRect(0, 0, ...this.size);
    if (!state) return this.mask.clearRect(0, 0, ...this.size);
    const { labels, unmerged, colors } = state;
    if (this.kind === "tokens") state.tokens.draw(this.mask, this.base.canvas, this.step);
    else if (this.kind === "changes") {
      const same = (i) => (labels.ids[i] === unmerged.ids[i] ? DARK : CHANGED);
      this.mask.putImageData(labels.paint(...this.size, unmerged ? same : () => DARK), 0, 0);
    } else {
      const palette = colors.map((color, id) => (this.lit === null ? abgr(color, 255) : id === this.lit ? 0 : DARK));
      this.mask.putImageData(labels.paint(...this.size, (i) => palette[labels.ids[i]]), 0, 0);
    }
    const fades = this.kind === "classes" && this.lit === null;
    this.mask.canvas.classList.toggle("fades", fades);
    if (this.cursor) this.light(this.cursor);
  }

  // Light up a class; null for none.
  lightClass(id) {
    if (this.kind === "tokens" || this.lit === id) return;
    this.lit = id;
    this.draw();
  }

  point(event) {
    const box = this.picture.getBoundingClientRect();
    this.cursor = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (this.state) this.light(this.cursor);
  }

  move(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by || !this.state) return;
    event.preventDefault();
    const { frameWidth, frameHeight, patch } = this.state.tokens;
    const [u, v] = this.cursor ?? [0.5, 0.5];
    const inside = (value) => Math.min(0.9999, Math.max(0, value));
    this.cursor = [inside(u + (by[0] * patch) / frameWidth), inside(v + (by[1] * patch) / frameHeight)];
    this.light(this.cursor);
  }

  leave() {
    this.cursor = null;
    this.top.clearRect(0, 0, ...(this.size ?? [0, 0]));
    this.told(null);
  }

  light([u, v]) {
    const { labels, unmerged, tokens } = this.state;
    const told = { id: labels.at(u, v), before: unmerged?.at(u, v) };
    this.top.clearRect(0, 0, ...this.size);
    if (this.kind === "tokens") {
      const at = tokens.at(u, v);
      const group = tokens.group(at, this.step);
      told.patches = group.length;
      this.top.fillStyle = "rgb(8 12 20 / 0.6)";
      this.top.fillRect(0, 0, ...this.size);
      const boxes = group.map((patch) => tokens.box(at.window, patch, ...this.size)).filter(Boolean);
      this.top.strokeStyle = "#fff";
      this.top.lineWidth = Math.max(2, this.size[0] / 500);
      for (const box of boxes) this.top.clearRect(...box);
      for (const box of boxes) this.top.strokeRect(...box);
    } else {
      const [width, height] = this.size;
      this.top.strokeStyle = "#fff";
      this.top.lineWidth = Math.max(1.5, width / 600);
      this.top.beginPath();
      this.top.arc(u * width, v * height, Math.max(4, width / 160), 0, 7);
      this.top.stroke();
    }
    this.told(told);
  }

  // The picture as it is seen, without the pointer.
  async file(opacity) {
    const seen = new OffscreenCanvas(...this.size);
    const context = seen.getContext("2d");
    context.drawImage(this.base.canvas, 0, 0);
    context.globalAlpha = this.mask.canvas.classList.contains("fades") ? opacity : 1;
    context.drawImage(this.mask.canvas, 0, 0);
    return seen.convertToBlob({ type: "image/png" });
  }
}
