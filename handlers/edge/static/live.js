// A strip with what the server does, from its own counters.

import { ask } from "./api.js";

const PAUSE = 2000;
const SECONDS = 10; // over which pictures a second are counted

export function watch(model) {
  const seen = [];
  let shown = null;

  async function look() {
    if (document.hidden || !model()) return;
    try {
      const figures = (await ask("/live")).models[model().name];
      if (shown !== model().name) seen.length = 0;
      shown = model().name;
      if (figures) show(figures);
      document.getElementById("live").hidden = !figures;
    } catch {
      document.getElementById("live").hidden = true;
    }
  }

  function show(figures) {
    const now = performance.now() / 1000;
    if (seen.length && figures.pictures < seen[seen.length - 1].pictures) seen.length = 0; // it was started again
    seen.push({ ...figures, now });
    while (seen.length > 2 && now - seen[1].now > SECONDS) seen.shift();
    const first = seen[0];
    const rate = now > first.now ? (figures.pictures - first.pictures) / (now - first.now) : 0;
    set("live-rate", rate < 10 ? rate.toFixed(1) : rate.toFixed(0));
    set("live-saved", percent(figures.tokens_saved, figures.tokens));
    set("live-merging", percent(figures.merge_seconds, figures.compute_seconds));
    set("live-queue", figures.inflight.toLocaleString("en"));
    set("live-agreement", percent(figures.agreement_sum, figures.agreement_count));
  }

  look();
  setInterval(look, PAUSE);
  document.addEventListener("visibilitychange", look);
}

function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(1)} %` : "–";
}

function set(id, text) {
  document.getElementById(id).textContent = text;
}
