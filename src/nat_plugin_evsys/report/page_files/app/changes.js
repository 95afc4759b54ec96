// 2. What changed? The same rows before and after, worst regressions first.

const CHANGE_FILTERS = [["all", "All"], ["worse", "Worse"], ["better", "Better"], ["same", "Same reward"]];
const CHANGE_PAGE = 12;

function Changes() {
  const choices = runs.flatMap(measuredCollections);
  const shown = choices.filter((collection) => collection.element !== null);
  if (shown.length < 2) {
    return html`<section id="changed"><h2>2. What changed?</h2>
      <div class="card empty">Nothing to compare yet: the rows are tried before training and after it.
        ${" "}Section 3 has every rollout of training.</div></section>`;
  }
  return html`<${ChangeList} choices=${choices} shown=${shown} />`;
}

function ChangeList({ choices, shown }) {
  // of two runs their ends are compared, of one run its ends
  const ofFirst = shown.filter((each) => each.run === runs[0]);
  const first = isComparison && ofFirst.length > 0 ? delivered(ofFirst) : shown[0];
  const [before, setBefore] = useState(first.key);
  const [after, setAfter] = useState(delivered(shown).key);
  const [filter, setFilter] = useState("all");
  const [search, setSearch] = useState("");
  const old = choices.find((collection) => collection.key === before);
  const now = choices.find((collection) => collection.key === after);
  const left = useRows(old);
  const right = useRows(now);
  const pairs = useMemo(() => (left.rows && right.rows ? pairUp(left.rows, right.rows) : null), [left.rows, right.rows]);
  const options = choices.map((each) => [each.key, isComparison ? `${"AB"[each.run.index]}, ${collectionName(each)}` : collectionName(each), each.element === null]);
  const what = now.kind !== "train" ? "Rows that were held out of training" : "Rows that were trained on";
  return html`<section id="changed">
    <h2>2. What changed?</h2>
    <p>${what}, tried once each by both policies. The worst regressions come first.</p>
    <div class="tools">
      <${Choice} label="From" options=${options} value=${before} onChange=${setBefore} />
      <${Choice} label="to" options=${options} value=${after} onChange=${setAfter} />
      <${Segments} label="Show rows" options=${labelled(pairs)} value=${filter} onChange=${setFilter} />
      <input type="search" placeholder="Search rows and replies" aria-label="Search rows and replies" value=${search}
        onInput=${(event) => setSearch(event.target.value)} />
    </div>
    ${left.error || right.error
      ? html`<div class="card error-text">${left.error ?? right.error}</div>`
      : pairs === null
        ? html`<div class="card empty">Reading the replies …</div>`
        : html`<${Pairs} pairs=${pairs} filter=${filter} search=${search} old=${old} now=${now} />`}
  </section>`;
}

/** The last collection, or that of the checkpoint for which its policy was given up. */
function delivered(shown) {
  const last = shown.at(-1);
  const saved = last.kind === "heldout" ? last.run.reloads[last.epoch] : undefined;
  return shown.find((each) => each.run === last.run && each.kind === "heldout" && each.epoch === saved) ?? last;
}

function labelled(pairs) {
  return CHANGE_FILTERS.map(([value, text]) => {
    if (pairs === null) return [value, text];
    const number = value === "all" ? pairs.length : pairs.filter((pair) => pair.change === value).length;
    return [value, `${text} ${number}`];
  });
}

/** The rows of both sides with what became of each, the worst change first. */
function pairUp(left, right) {
  const before = new Map(left.map((row) => [row.id, row]));
  const pairs = right.filter((row) => before.has(row.id)).map((row) => {
    const old = before.get(row.id).attempts[0];
    const now = row.attempts[0];
    const delta = (now.reward ?? 0) - (old.reward ?? 0);
    const change = delta > 0 ? "better" : delta < 0 ? "worse" : "same";
    const text = [row.id, textOf(row.question), said(old), said(now)].join("\n").toLowerCase();
    return { row, old, now, delta, change, text };
  });
  return pairs.sort((one, other) => one.delta - other.delta || (one.now.reward ?? 0) - (other.now.reward ?? 0));
}

function said(attempt) {
  return textOf(attempt.output) || attempt.error || "";
}

function Pairs({ pairs, filter, search, old, now }) {
  const wanted = search.trim().toLowerCase();
  const found = pairs.filter((pair) => (filter === "all" || pair.change === filter) && pair.text.includes(wanted));
  const [page, more] = usePages(found, CHANGE_PAGE, `${filter}/${search}/${old.key}/${now.key}`);
  if (found.length === 0) return html`<div class="card empty">No row is like that.</div>`;
  return html`<div class="card list">
    ${page.map((pair) => html`<${Pair} pair=${pair} old=${old} now=${now} key=${pair.row.id} />`)}
  </div>${more}`;
}

function Pair({ pair, old, now }) {
  const [open, setOpen] = useState(false);
  const { row, delta, change } = pair;
  const sign = change === "better" ? "▲" : change === "worse" ? "▼" : "=";
  const tone = change === "better" ? "up" : change === "worse" ? "down" : "muted";
  return html`<article class="change">
    <header>
      <span class="delta ${tone}">${sign} ${change === "same" ? "same" : signed(delta, 2)}</span>
      <span class="question clamp">${titleOf(row)}</span>
      <span class="small muted">${row.id}</span>
    </header>
    ${textOf(row.expected) && html`<div class="small muted clamp">wants ${" "}<span style="color: var(--ink)">${textOf(row.expected)}</span></div>`}
    <div class="sides">
      <${Side} collection=${old} attempt=${pair.old} open=${open} />
      <${Side} collection=${now} attempt=${pair.now} open=${open} />
    </div>
    <button type="button" class="link" aria-expanded=${String(open)} onClick=${() => setOpen(!open)}>
      ${open ? "Hide the conversations" : "Show the conversations"}</button>
  </article>`;
}

function Side({ collection, attempt, open }) {
  const name = isComparison ? `${"AB"[collection.run.index]}, ${collectionName(collection)}` : collectionName(collection);
  return html`<div class="side">
    <header><span>${name}</span><${Reward} value=${attempt.reward ?? null} range=${collection.run.range} /></header>
    ${open
      ? html`<${Transcript} attempt=${attempt} mode="plain" />`
      : html`<div class="said clamp ${attempt.error ? "error-text" : ""}">${said(attempt) || html`<span class="muted">(nothing)</span>`}</div>`}
  </div>`;
}
