// Numbers and small parts that every section uses.

const { html, render, useEffect, useLayoutEffect, useMemo, useRef, useState } = htmPreact;

const MINUS = "\u2212";

function fixed(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return Number(value).toFixed(digits).replace("-", MINUS);
}

function signed(value, digits = 3) {
  return (value > 0 ? "+" : "") + fixed(value, digits);
}

function count(value) {
  if (value === null || value === undefined) return "–";
  return Math.round(value).toLocaleString("en-US");
}

function share(value, digits = 0) {
  return `${(100 * value).toFixed(digits)}%`;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const [whole, minutes] = [Math.round(seconds), Math.round(seconds / 60)];
  if (whole < 600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** What a field holds as text: a string as it is, anything else as JSON, on one line where it is short. */
function textOf(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "string") return value;
  const line = JSON.stringify(value);
  return line.length <= 72 ? line : JSON.stringify(value, null, 2);
}

function shortened(text, length) {
  return text.length <= length ? text : `${text.slice(0, length - 1)}…`;
}

/** What a row asks, in words where the row is JSON. */
function titleOf(row) {
  return row.title ?? textOf(row.question);
}

/** A sentence of this package, whose `names` in backticks are shown as code. */
function prose(text) {
  return text.split("`").map((part, index) => (index % 2 ? html`<code key=${index}>${part}</code>` : part));
}

/** Like `textOf`, but the fields of an object stand on lines of their own. */
function linesOf(value) {
  const isObject = value !== null && typeof value === "object" && !Array.isArray(value);
  return isObject ? Object.entries(value).map(([name, item]) => `${name}: ${textOf(item)}`).join("\n") : textOf(value);
}

/** A reward's place between the lowest and the highest of a run, as a background and a text colour. */
function rewardStyle(reward, [low, high]) {
  if (reward === null || reward === undefined) return "background: var(--raised); color: var(--muted)";
  const place = high > low ? (reward - low) / (high - low) : 1;
  const side = place >= 0.5 ? "--good" : "--bad";
  const strength = 12 + 26 * Math.abs(place - 0.5) * 2;
  return `background: color-mix(in srgb, var(${side}) ${strength.toFixed(0)}%, transparent); color: var(--ink)`;
}

function Reward({ value, range }) {
  const shown = value === null || value === undefined ? "none" : fixed(value, Number.isInteger(value) ? 0 : 2);
  return html`<span class="reward" style=${rewardStyle(value, range)}>${shown}</span>`;
}

/** Buttons of which one is pressed. `options`: [value, label] each. */
function Segments({ label, options, value, onChange }) {
  return html`<div class="segments" role="group" aria-label=${label}>
    ${options.map(
      ([option, text]) => html`<button type="button" aria-pressed=${String(option === value)}
        onClick=${() => onChange(option)}>${text}</button>`,
    )}
  </div>`;
}

function Choice({ label, options, value, onChange }) {
  return html`<label>${label}
    <select value=${String(value)} onChange=${(event) => onChange(event.target.value)}>
      ${options.map(
        ([option, text, disabled]) => html`<option value=${String(option)} disabled=${disabled}
          selected=${String(option) === String(value)}>${text}</option>`,
      )}
    </select></label>`;
}

/** The first items of a list, and a button that shows more of them. */
function usePages(items, size, key) {
  const [shown, setShown] = useState({ key, pages: 1 });
  const pages = shown.key === key ? shown.pages : 1;
  const rest = items.length - pages * size;
  const more =
    rest > 0
      ? html`<button type="button" class="button more" onClick=${() => setShown({ key, pages: pages + 1 })}>
          Show ${count(Math.min(rest, size))} more of ${count(rest)}</button>`
      : null;
  return [items.slice(0, pages * size), more];
}

function useWide() {
  const query = useMemo(() => window.matchMedia("(min-width: 1001px)"), []);
  const [wide, setWide] = useState(query.matches);
  useEffect(() => {
    const look = () => setWide(query.matches);
    query.addEventListener("change", look);
    return () => query.removeEventListener("change", look);
  }, [query]);
  return wide;
}
