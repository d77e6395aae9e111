// Speak to the server: keys, errors in words, streams of events.

const KEY = "hart-infer-key";
const UNREACHABLE = "The server can't be reached. Is it still running?";
const BROKEN = "The connection ended before everything had arrived.";

/** What the server, or the way to it, says is wrong. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

let asking = null; // one question for a key at a time

/** Ask for an API key. Resolves to whether one was given. */
function askForKey(why) {
  asking ??= new Promise((resolve) => {
    const box = document.getElementById("key-box");
    const input = document.getElementById("key");
    document.getElementById("key-why").textContent = why;
    input.value = "";
    box.returnValue = "cancel";
    document.getElementById("key-cancel").onclick = () => box.close("cancel");
    box.addEventListener("close", () => {
      asking = null;
      const key = input.value.trim();
      const isGiven = box.returnValue === "use" && key !== "";
      if (isGiven) sessionStorage.setItem(KEY, key);
      input.value = "";
      resolve(isGiven);
    }, { once: true });
    box.showModal();
    input.focus();
  });
  return asking;
}

/** Send a request, with a key if one is known; ask for one where it is needed. Throws ApiError for all but success. */
export async function call(path, { json, form, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = {};
  if (json !== undefined) headers["Content-Type"] = "application/json";
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  const body = form ?? (json === undefined ? undefined : JSON.stringify(json));
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(UNREACHABLE);
  }
  if (response.ok) return response;
  const message = await words(response);
  if (response.status === 401) {
    const why = key === null ? "It is kept in this tab only." : "The server does not know that key. Try another.";
    if (sessionStorage.getItem(KEY) !== key || (await askForKey(why))) return call(path, { json, form, signal });
  }
  throw new ApiError(message, { status: response.status, retryAfter: Number(response.headers.get("Retry-After")) || 0 });
}

async function words(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

/** Yield the data of a stream's server-sent events, as texts. Throws ApiError where it breaks or the server says so. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError(BROKEN);
      }
      if (read.done) return;
      const blocks = (rest + read.value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = block.split(/\r?\n/).map((line) => line.split(/: ?(.*)/s, 2));
        const data = fields.filter(([name]) => name === "data").map(([, value]) => value).join("\n");
        if (fields.some(([name, value]) => name === "event" && value === "error")) throw failure(data);
        if (data) yield data;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function failure(data) {
  return new ApiError(JSON.parse(data).error.message);
}

export const broken = () => new ApiError(BROKEN);

/** Return a picture's file from its base64. */
export function blobOf(base64, type = "image/png") {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}
