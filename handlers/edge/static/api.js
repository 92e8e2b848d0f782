// The server's answers; see /openapi.json.

const TRIES = 5;

export class Refused extends Error {
  constructor(status, text, requestId = "") {
    super(text);
    this.status = status;
    this.requestId = requestId;
  }
}

export async function ask(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Refused(answer.status, answer.statusText);
  return answer.json();
}

// A picture's answer: JSON with merge maps, or what `headers` ask for instead.
export async function segment(model, picture, merger, { signal, headers = { "X-MPM-View": "maps" } } = {}) {
  const asked = { "Content-Type": "application/octet-stream", ...headers, ...headersOf(merger) };
  for (let tries = 1; ; tries++) {
    const answer = await send(model.path, { method: "POST", body: picture, headers: asked, signal });
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => ({ error: answer.statusText }));
    if (answer.status !== 503 || tries === TRIES) throw new Refused(answer.status, told.error, told.request_id);
    await pause(1000 * (Number(answer.headers.get("Retry-After")) || 1), signal);
  }
}

export function headersOf(merger) {
  return merger && !merger.is_default ? { [merger.header]: merger.value } : {};
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server can't be reached.");
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
