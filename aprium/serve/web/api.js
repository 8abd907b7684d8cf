// Calls to the server that served this page: the key, errors as sentences, streams of events.

const BASE = new URL("../", import.meta.url); // also where a proxy puts the server below a path
const KEY = "aprium.key";

/** What went wrong, in the server's own words; `status` is 0 where it could not be reached. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let askForKey = async () => null;
let asking = null;

/** Set how to ask for a key: a function of whether one was wrong, to a key or null. */
export function setKeyPrompt(ask) {
  askForKey = ask;
}

/** Return the key that calls carry; it is forgotten with the tab. */
export function getKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

/** Keep a key for this tab. */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/**
 * Send a request and return the response; `body` makes it a POST. Asks for a key where one is
 * wanted (not with `quiet`), and throws ApiError for every refusal.
 */
export async function request(path, { method, body, signal, quiet = false } = {}) {
  for (;;) {
    const key = getKey();
    const response = await send(path, { method, body, signal, key });
    if (response.ok) return response;
    if (response.status !== 401 || quiet) throw await refusal(response);
    if (getKey() === key) {
      // Calls that fail together ask once.
      asking ??= askForKey(key !== "").finally(() => (asking = null));
      if ((await asking) === null) throw await refusal(response);
    }
  }
}

/** The same for an answer that is JSON. */
export async function json(path, options) {
  return (await request(path, options)).json();
}

async function send(path, { method, body, signal, key }) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  try {
    return await fetch(new URL(path, BASE), {
      method: method ?? (body === undefined ? "GET" : "POST"),
      body: body === undefined ? undefined : JSON.stringify(body),
      headers,
      signal,
      cache: "no-store",
      credentials: "same-origin", // for a proxy in front that wants its own
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.", 0);
  }
}

async function refusal(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not one of the server's own errors: a proxy's page, say.
  }
  return new ApiError(message[0].toUpperCase() + message.slice(1), response.status);
}

/** Yield the events of a stream; throws ApiError for one that tells of an error, or is cut off. */
export async function* events(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError("The connection was lost before the answer ended.", 0);
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, event.error.code);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The connection was lost.", 0);
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
