import { Refused, ask, headersOf, segment } from "./api.js";
import { connectCamera } from "./camera.js";
import { Labels } from "./labels.js";
import { watch } from "./live.js";
import { Tokens } from "./tokens.js";
import { View } from "./view.js";

const RESULTS = ["toolbar", "downloads", "results"]; // what there is only with a result
const MEASURED = 5; // times, each way
const RETRY = 2000; // milliseconds until a model that is not ready is looked at again
const $ = (id) => document.getElementById(id);

let service; // what /info tells
let model; // the one of its models that is asked
let picture = null; // the file that was sent
let result = null; // of it, and `plain`: without merging
let running = new AbortController();

const view = new View(readOut);

// What the server offers

async function begin() {
  try {
    service = await ask("/info");
  } catch (error) {
    return complain(error);
  }
  const select = $("model");
  select.replaceChildren(...service.models.map(({ name }) => new Option(name)));
  $("models").hidden = service.models.length < 2;
  $("examples").hidden = !service.examples.length;
  $("example-list").replaceChildren(...service.examples.map(example));
  chooseModel();
}

function chooseModel() {
  model = service.models[Math.max(0, $("model").selectedIndex)];
  const server = service.server === "triton" ? "Triton" : "TorchServe";
  $("about").textContent = [model?.name, server, model?.runtime, model?.precision].filter(Boolean).join(" · ");
  if (!model?.is_ready) {
    complain(new Refused(503, "The model is being loaded."));
    return setTimeout(begin, RETRY);
  }
  $("alert").hidden = true;
  const order = [...model.mergers].sort((a, b) => b.is_default - a.is_default);
  $("merger").replaceChildren(...order.map((merger) => new Option(title(merger), merger.name)));
  describeMerger();
}

function title({ name, is_default: isDefault }) {
  const plain = /^[\d,]+$/.test(name) ? `MPM before blocks ${name.replaceAll(",", ", ")}` : name;
  return (name === "off" ? "No merging" : plain) + (isDefault ? " (served)" : "");
}

function merger() {
  return model.mergers.find(({ name }) => name === $("merger").value);
}

function unmerged() {
  return model.mergers.find(({ name }) => name === "off");
}

function describeMerger() {
  const { name } = merger();
  $("merger-hint").textContent =
    name === "off"
      ? "Every patch keeps its own token."
      : name.includes(":")
        ? "Another way to merge that this server allows."
        : "Before these blocks the most similar pairs of tokens become one.";
  const headers = Object.entries(headersOf(merger())).map(([key, value]) => ` -H '${key}: ${value}'`);
  const file = (picture?.name ?? "photo.jpg").replaceAll("'", "");
  $("command").textContent = `curl -T '${file}'${headers.join("")} \\\n  ${location.origin}${model.path} -o mask.png`;
}

function example(path) {
  const button = element("button", { className: "example", title: path.split("/").pop() });
  button.append(element("img", { src: path, alt: path.split("/").pop().replace(/\..*/, "").replaceAll("_", " ") }));
  button.addEventListener("click", async () => {
    const answer = await fetch(path);
    take(await answer.blob(), path.split("/").pop());
  });
  return button;
}

// A picture's way

async function take(blob, name) {
  if (!model?.is_ready) return;
  const given = blob instanceof File ? blob : new File([blob], name);
  const bitmap = await createImageBitmap(given).catch(() => null);
  if (!result && bitmap) {
    uncover();
    view.open(bitmap, bitmap.width, bitmap.height);
  }
  await run({ given, bitmap });
}

// Segment a new picture, or the one that is there as it is now to be merged.
async function run({ given = picture, bitmap = null } = {}) {
  if (!given) return describeMerger();
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const isNew = given !== picture;
  $("alert").hidden = true;
  busy("Segmenting…");
  try {
    const chosen = merger();
    const answer = await compute(given, chosen, signal);
    if (isNew) view.open(bitmap, answer.width, answer.height);
    const plain = chosen.name === "off" ? answer : isNew ? null : result.plain;
    result = { ...answer, plain, isBlank: isNew ? !bitmap : result.isBlank };
    picture = given;
    show();
    if (!plain && unmerged()) {
      busy("The same without merging…");
      result.plain = await compute(picture, unmerged(), signal);
      show();
    }
    busy("");
  } catch (error) {
    if (signal.aborted) return;
    busy("");
    complain(error, given.name);
    if (!result) cover();
  }
}

async function compute(picture, chosen, signal) {
  const told = await (await segment(model, picture, chosen, { signal })).json();
  signal.throwIfAborted();
  const counts = sums(told.tokens_per_window);
  return {
    told,
    width: told.width,
    height: told.height,
    labels: new Labels(told, model.classes.length),
    tokens: new Tokens(told.merging, counts.length - 1),
    counts,
    milliseconds: told.timings_ms.compute + told.timings_ms.merge,
    merging: told.timings_ms.merge,
  };
}

// Tokens of the picture after each merge; a window that merged less often keeps what it has.
function sums(windows) {
  const length = Math.max(...windows.map((counts) => counts.length));
  return Array.from({ length }, (_, i) => windows.reduce((sum, counts) => sum + (counts[i] ?? counts.at(-1)), 0));
}

async function measure() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const times = { merged: [], plain: [] };
  try {
    for (let i = 1; i <= MEASURED; i++) {
      busy(`Measuring, ${i} of ${MEASURED}…`);
      for (const [key, chosen] of [["merged", merger()], ["plain", unmerged()]]) {
        const { timings_ms: told } = await (await segment(model, picture, chosen, { signal })).json();
        times[key].push({ milliseconds: told.compute + told.merge, merging: told.merge });
      }
    }
    Object.assign(result, median(times.merged));
    Object.assign(result.plain, median(times.plain));
    showComparison(`median of ${MEASURED}`);
  } catch (error) {
    if (signal.aborted) return;
    complain(error);
  }
  busy("");
}

function median(times) {
  return times.sort((a, b) => a.milliseconds - b.milliseconds)[Math.floor(times.length / 2)];
}

// What is shown

function show() {
  uncover();
  describeMerger();
  for (const id of RESULTS) $(id).hidden = false;
  const hasMerged = result.counts.length > 1;
  $("changes-tab").hidden = !(result.plain && hasMerged);
  if ($("changes-tab").hidden && kind() === "changes") document.querySelector("[name=view]").checked = true;
  $("step").max = result.counts.length - 1;
  $("step").value = result.counts.length - 1;
  showComparison();
  showSteps();
  showClasses();
  const { labels, tokens, plain } = result;
  view.step = result.counts.length - 1;
  view.kind = kind();
  view.lit = null;
  view.show({ labels, tokens, unmerged: plain?.labels ?? null, colors: model.classes.map(({ color }) => color) });
  fade();
  readOut(null);
  changeStep(view.step);
}

function kind() {
  return document.querySelector("[name=view]:checked").value;
}

function changeKind() {
  $("opacity-label").hidden = kind() !== "classes";
  $("step-label").hidden = $("legend").hidden = kind() !== "tokens";
  if (result) view.set({ kind: kind(), lit: null });
  pressStep();
  readOut(null);
}

function changeStep(step) {
  $("step").value = step;
  $("step-name").textContent = stepName(step);
  view.set({ step });
  pressStep();
}

function pressStep() {
  const shown = kind() === "tokens" ? view.step : -1;
  document.querySelectorAll("#steps button").forEach((bar, i) => bar.setAttribute("aria-pressed", i === shown));
}

function stepName(step) {
  return step ? `After merge ${step}` : "Before merging";
}

function showComparison(how = "one run each") {
  const { plain, counts, milliseconds, merging } = result;
  const isMerged = counts.length > 1;
  $("measure").hidden = !(plain && isMerged);
  $("agreement").textContent = plain && isMerged ? percent(result.labels.agreement(plain.labels), 2) : "–";
  $("speedup").textContent = plain && isMerged ? `${(plain.milliseconds / milliseconds).toFixed(2)}×` : "–";
  const longest = Math.max(milliseconds, plain?.milliseconds ?? 0);
  const rows = [];
  if (isMerged) {
    rows.push(bar("div", "With", milliseconds / longest, `${milliseconds.toFixed(0)} ms`, "accent"));
  }
  if (plain) rows.push(bar("div", "Without", plain.milliseconds / longest, `${plain.milliseconds.toFixed(0)} ms`));
  else rows.push(bar("div", "Without", 0, "…"));
  $("times").replaceChildren(...rows);
  $("merge-time").textContent = isMerged ? `${merging.toFixed(1)} ms of it are merging; ${how}.` : "";
}

function showSteps() {
  const { counts } = result;
  const rows = counts.map((count, i) => {
    const note = i ? `${count.toLocaleString("en")} · ${percent(count / counts[0], 0)}` : count.toLocaleString("en");
    const row = bar("button", i ? `Merge ${i}` : "Patches", count / counts[0], note, "accent");
    row.title = "Show these tokens";
    row.addEventListener("click", () => {
      document.querySelector("[name=view][value=tokens]").checked = true;
      changeKind();
      changeStep(i);
    });
    return row;
  });
  $("steps").replaceChildren(...rows);
}

function bar(tag, name, share, note, kindOfBar = "") {
  const row = element(tag, { className: "bar" });
  const track = element("span", { className: "track" });
  const fill = element("span", { className: `fill ${kindOfBar}` });
  fill.style.width = `${100 * share}%`;
  track.append(fill);
  row.append(element("span", { textContent: name }), track, element("span", { className: "note", textContent: note }));
  return row;
}

function showClasses() {
  const total = result.width * result.height;
  const rows = result.told.classes.map(({ id, name, color, area }) => {
    const button = element("button", { className: "class" });
    button.dataset.id = id;
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = `rgb(${color.join(" ")})`;
    const track = element("span", { className: "track" });
    const fill = element("span", { className: "fill" });
    fill.style.width = `${(100 * area) / result.told.classes[0].area}%`;
    fill.style.background = `rgb(${color.join(" ")})`;
    track.append(fill);
    button.append(swatch, element("span", { className: "name", textContent: name }), track);
    button.append(element("span", { className: "note", textContent: percent(area / total) }));
    lightUp(button, id);
    const row = element("li", {});
    row.append(button);
    return row;
  });
  $("classes").replaceChildren(...rows);
}

// By the mouse, by the keyboard, and by a finger, which is gone after a tap.
function lightUp(button, id) {
  const byMouse = (act) => (event) => event.pointerType === "mouse" && act();
  button.addEventListener("pointerenter", byMouse(() => view.lightClass(id)));
  button.addEventListener("pointerleave", byMouse(() => view.lightClass(null)));
  button.addEventListener("focus", () => button.matches(":focus-visible") && view.lightClass(id));
  button.addEventListener("blur", () => view.lightClass(null));
  button.addEventListener("click", (event) => {
    if (event.pointerType !== "mouse") view.lightClass(view.lit === id ? null : id);
  });
}

function readOut(at) {
  document.querySelectorAll(".class").forEach((row) => row.classList.toggle("on", at !== null && row.dataset.id == at.id));
  const names = (id) => model.classes[id].name;
  if (!at) {
    const hints = {
      classes: "Move over the picture to read it; over a class to light it up.",
      tokens: "Move over a patch to light up those that share its token.",
      changes: "Pink: pixels whose class merging changed.",
    };
    $("readout").textContent = !result
      ? ""
      : result.isBlank
        ? "This browser can't show pictures of this format: here is the mask alone."
        : hints[kind()];
  } else if (at.patches) {
    $("readout").textContent =
      at.patches === 1 ? `${names(at.id)}: a patch with a token of its own` : `${names(at.id)}: ${at.patches} patches share this token`;
  } else {
    const changed = at.before !== undefined && at.before !== at.id ? `, ${names(at.before)} without merging` : "";
    $("readout").textContent = names(at.id) + changed;
  }
}

function busy(text) {
  $("busy").hidden = !text;
  $("busy-text").textContent = text;
  $("empty").inert = Boolean(text);
}

function uncover() {
  $("empty").hidden = true;
  $("frame").classList.add("filled");
}

function cover() {
  view.picture.hidden = true;
  $("empty").hidden = false;
  $("frame").classList.remove("filled");
}

function complain(error, name = "") {
  const titles = {
    0: "No answer",
    400: `${name || "This"} could not be read`,
    413: `${name || "This"} is too large`,
    503: "The server is busy",
    504: "The server was too late",
  };
  $("alert").hidden = false;
  $("alert-title").textContent = titles[error.status] ?? "Something went wrong";
  $("alert-text").textContent = error.message + (error.requestId ? ` (request ${error.requestId.slice(0, 8)})` : "");
}

// What people do

function fade() {
  document.documentElement.style.setProperty("--opacity", $("opacity").value / 100);
}

function save(blob, ending) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: picture.name.replace(/\.\w+$/, "") + ending }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function connect() {
  $("choose").addEventListener("click", () => $("file").click());
  $("empty").addEventListener("click", () => $("file").click());
  for (const id of ["file", "capture"]) {
    $(id).addEventListener("change", ({ target }) => {
      if (target.files[0]) take(target.files[0]);
      target.value = "";
    });
  }
  connectCamera({ button: $("camera"), capture: $("capture"), take });
  document.addEventListener("paste", ({ clipboardData }) => {
    if (clipboardData.files[0]) take(clipboardData.files[0], "pasted.png");
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  $("model").addEventListener("change", () => {
    chooseModel();
    const again = picture;
    picture = result = null;
    for (const id of RESULTS) $(id).hidden = true;
    if (again) take(again);
  });
  $("merger").addEventListener("change", () => run());
  document.querySelectorAll("[name=view]").forEach((tab) => tab.addEventListener("change", changeKind));
  $("opacity").addEventListener("input", fade);
  $("step").addEventListener("input", ({ target }) => changeStep(Number(target.value)));
  $("measure").addEventListener("click", measure);
  $("save-json").addEventListener("click", () => {
    save(new Blob([JSON.stringify(result.told)], { type: "application/json" }), ".json");
  });
  $("save-overlay").addEventListener("click", async () => save(await view.file($("opacity").value / 100), "_overlay.png"));
  $("save-mask").addEventListener("click", async () => {
    try {
      const answer = await segment(model, picture, merger(), { headers: { Accept: "image/png" } });
      save(await answer.blob(), "_mask.png");
    } catch (error) {
      complain(error);
    }
  });
  $("copy").addEventListener("click", async () => {
    getSelection().selectAllChildren($("command"));
    await navigator.clipboard?.writeText($("command").textContent);
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 1500);
  });
}

function element(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)} %`;
}

connect();
begin();
watch(() => model);
