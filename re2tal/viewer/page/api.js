// Requests to the page's own server. Addresses are relative, so the token in the page's address is in all of them.

/** An answer that is an error: `status`, and what the server said about it. */
export class Refusal extends Error {
  constructor(status, content) {
    super(content.error ?? `the server answered ${status}`);
    this.status = status;
    this.content = content;
  }
}

/** GET `path`, or POST `content` to it; the parsed answer. */
export async function request(path, content) {
  let answer;
  try {
    answer = await fetch(path, content === undefined ? {} : {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(content),
    });
  } catch {
    throw new Refusal(0, { error: "The server does not answer; is `re2tal view` still running?" });
  }
  const parsed = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refusal(answer.status, parsed);
  return parsed;
}

/** An element with text; text is never markup. */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export const byId = (id) => document.getElementById(id);

export const seconds = (value) => `${value.toFixed(2)} s`;

/** 1, "video" -> "1 video"; 2, "video" -> "2 videos". */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
