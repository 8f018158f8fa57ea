// Requests to the gateway, whose errors are texts to show, and the events of a song.

/** A request that was refused. `field` is the name of the input that it is about, or "". */
export class Refused extends Error {
  constructor(status, message, field = "") {
    super(message);
    this.status = status;
    this.field = field;
  }
}

const watchers = [];

/** Call `watcher` with `true` or `false` as the gateway begins or stops answering, with "key" when it needs one. */
export function onConnection(watcher) {
  watchers.push(watcher);
}

export function reportConnection(state) {
  for (const watcher of watchers) watcher(state);
}

/** Fetch JSON; throws `Refused` with a text that can be shown. */
export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    reportConnection(false);
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  reportConnection(true);
  let body = {};
  try {
    body = await response.json();
  } catch {
    // an answer without a body, or one from a proxy
  }
  // /health has the same body with status 503 as with 200.
  if (response.ok || (path === "/health" && body.workers)) return body;
  if (response.status === 401) reportConnection("key");
  throw refusal(response.status, response.statusText, body, response.headers.get("Retry-After"));
}

/** The error for an answer of 400 and above, whose `body` is a problem, or {}. */
export function refusal(status, statusText, body, retryAfter) {
  let text = body.detail || `The server answered ${status} ${statusText}.`;
  if (body.field && text.startsWith(`${body.field}: `)) text = text.slice(body.field.length + 2);
  text = sentence(text);
  const wait = Number(retryAfter);
  if (status === 429 && wait) text += ` Try again in ${wait} s.`;
  return new Refused(status, text, body.field || "");
}

/** POST a JSON object. */
export function post(path, body) {
  return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
}

/** Make a sentence of a text: a capital letter at its start, a full stop at its end. */
export function sentence(text) {
  const first = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(first) ? first : `${first}.`;
}

const LONGEST_PAUSE = 10_000; // ms between two attempts to connect

/**
 * Follow a song to its end. `onState` gets every state, `onEnd` is called once. Returns a function that stops following.
 */
export function follow(jobId, onState, onEnd) {
  let last = null; // id of the latest event that arrived
  let pause = 500;
  let socket = null;
  let timer = 0;
  let stopped = false;

  function connect() {
    const url = new URL(`/generate/${jobId}/events`, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    if (last !== null) url.searchParams.set("after", last);
    socket = new WebSocket(url);
    socket.onmessage = (message) => {
      pause = 500;
      const frame = JSON.parse(message.data);
      if (frame.type === "snapshot") {
        last ??= frame.id;
        onState(frame);
      } else {
        last = frame.id;
        onState(frame.data);
      }
    };
    socket.onclose = (closed) => {
      if (stopped) return;
      if (closed.code === 4401) reportConnection("key");
      if ([1000, 4401, 4404].includes(closed.code)) {
        stopped = true;
        onEnd();
        return;
      }
      timer = setTimeout(connect, pause);
      pause = Math.min(pause * 2, LONGEST_PAUSE);
    };
  }

  connect();
  return () => {
    stopped = true;
    clearTimeout(timer);
    socket.close();
  };
}
