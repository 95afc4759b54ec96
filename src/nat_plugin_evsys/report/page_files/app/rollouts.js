// 3. Why? Every group of an epoch, its attempts, and what was trained.

const GROUP_PAGE = 25;
const GROUP_ORDERS = [["dataset", "as in the dataset"], ["worst", "lowest reward first"], ["best", "highest reward first"], ["spread", "largest difference first"]];

const DROP_REASONS = report.drop_reasons;

function Rollouts() {
  const kept = runs.some((run) => run.collections.length > 0);
  if (!kept) {
    return html`<section id="why"><h2>3. Why?</h2><div class="card empty">This run kept no rollouts
      (<code>trainers.${"<name>"}.keep_rollouts</code>).</div></section>`;
  }
  return html`<${RolloutBrowser} />`;
}

/** The place that the address names: #at=run/kind/epoch/row/attempt. */
function placeInAddress() {
  const found = location.hash.match(/^#at=(.*)$/);
  if (!found) return null;
  const [run, kind, epoch, row, attempt] = found[1].split("/").map(decodeURIComponent);
  return { key: `${run}/${kind}/${epoch}`, row, attempt: Number(attempt) };
}

function RolloutBrowser() {
  const collections = runs.flatMap((run) => run.collections);
  const shown = collections.filter((collection) => collection.element !== null);
  const trained = shown.filter((collection) => collection.kind === "epoch" && collection.run === runs.at(-1));
  const place = useMemo(placeInAddress, []);
  const start = shown.find((collection) => collection.key === place?.key) ?? trained.at(-1) ?? shown.at(-1);
  const [key, setKey] = useState(start?.key);
  const [chosen, setChosen] = useState(place ? { row: place.row, attempt: place.attempt } : null);
  const collection = collections.find((each) => each.key === key);
  const state = useRows(collection);
  const choose = (picked) => {
    setChosen(picked);
    const address = picked && [...key.split("/"), picked.row, picked.attempt].map(encodeURIComponent).join("/");
    history.replaceState(null, "", address ? `#at=${address}` : "#why");
  };
  const open = (next) => {
    setKey(next);
    setChosen(null);
  };
  useEffect(() => { if (place) document.getElementById("why").scrollIntoView(); }, []);
  return html`<section id="why">
    <h2>3. Why?</h2>
    <p>Each row was attempted several times. What earned more than the other attempts at the row was made more likely,
      ${" "}what earned less was made less likely. Choose an attempt, then a token.</p>
    <${EpochTools} shown=${shown} collections=${collections} collection=${collection} open=${open} />
    ${state.error
      ? html`<div class="card error-text">${state.error}</div>`
      : state.rows === undefined
        ? html`<div class="card empty">Reading the rollouts …</div>`
        : html`<${Groups} key=${key} collection=${collection} rows=${state.rows} chosen=${chosen} choose=${choose} />`}
  </section>`;
}

function EpochTools({ shown, collections, collection, open }) {
  const names = { epoch: "", base: "held-out, ", heldout: "held-out, ", train: "training rows, " };
  const options = collections.map((each) => [
    each.key,
    `${isComparison ? `${"AB"[each.run.index]}: ` : ""}${names[each.kind]}${collectionName(each)}${each.element === null ? " (not in this file)" : ""}`,
    each.element === null,
  ]);
  const at = shown.indexOf(collection);
  const leftOut = collections.length - shown.length;
  return html`<div>
    <div class="tools">
      <span class="pager">
        <button type="button" class="button icon" aria-label="Earlier" disabled=${at <= 0} onClick=${() => open(shown[at - 1].key)}>‹</button>
        <${Choice} label="Rollouts of" options=${options} value=${collection.key} onChange=${open} />
        <button type="button" class="button icon" aria-label="Later" disabled=${at >= shown.length - 1} onClick=${() => open(shown[at + 1].key)}>›</button>
      </span>
      <${EpochSummary} collection=${collection} />
    </div>
    ${leftOut > 0 && html`<p class="small muted" style="margin: -4px 0 12px">To keep this file small, ${plural(leftOut, "set")} of rollouts ${leftOut === 1 ? "is" : "are"}
      ${" "}left out: <code>nat evsys report --max-mb 100</code> embeds more, <code>nat evsys rollouts</code> prints them.</p>`}
  </div>`;
}

/** What became of the epoch's rollouts, by the run's own count (not only of those that were kept). */
function EpochSummary({ collection }) {
  const epoch = collection.run.per_epoch.find((each) => each.epoch === collection.epoch);
  if (collection.kind !== "epoch" || !epoch) {
    return html`<span class="small muted">${plural(collection.rollouts, "rollout")}, made to measure the policy</span>`;
  }
  const dropped = Object.entries(epoch.dropped);
  const kept = collection.rollouts < epoch.rollouts ? `, of which ${count(collection.rollouts)} were kept` : "";
  return html`<span class="small muted">${plural(epoch.rollouts, "rollout")}${kept}: ${count(epoch.trained)} trained on${dropped.map(
    ([reason, number]) => html`<span key=${reason}>, ${count(number)} not (<span title=${DROP_REASONS[reason] ?? ""}>${reason}</span>)</span>`,
  )}</span>`;
}

function Groups({ collection, rows, chosen, choose }) {
  const wide = useWide();
  const [order, setOrder] = useState("dataset");
  const [fate, setFate] = useState("all");
  const [search, setSearch] = useState("");
  const groups = useMemo(() => rows.map(summed), [rows]);
  const fates = useMemo(() => fateOptions(groups), [groups]);
  const found = useMemo(() => sorted(groups.filter((group) => matches(group, fate, search)), order), [groups, fate, search, order]);
  const [page, more] = usePages(found, GROUP_PAGE, `${order}/${fate}/${search}`);
  const picked = chosen && groups.find((group) => group.id === chosen.row);
  const fallback = picked ?? found[0];
  const active = picked ? chosen : fallback && wide ? { row: fallback.id, attempt: fallback.attempts[0].number } : null;
  const detail = active && html`<${Detail} key=${`${active.row}/${active.attempt}`} group=${fallback} number=${active.attempt} collection=${collection} />`;
  return html`<div>
    <div class="tools">
      <${Choice} label="Order" options=${GROUP_ORDERS} value=${order} onChange=${setOrder} />
      ${fates.length > 2 && html`<${Choice} label="Show" options=${fates} value=${fate} onChange=${setFate} />`}
      <input type="search" placeholder="Search in everything that was said" aria-label="Search in everything that was said" value=${search}
        onInput=${(event) => setSearch(event.target.value)} />
      <span class="small muted" role="status">${plural(found.length, "row")}</span>
    </div>
    ${found.length === 0
      ? html`<div class="card empty">No row is like that.</div>`
      : html`<div class="why">
          <div class="groups">
            ${page.map((group) => html`<${Group} key=${group.id} group=${group} range=${collection.run.range} active=${active} choose=${choose}
              detail=${!wide && active?.row === group.id ? detail : null} />`)}
            ${more}
          </div>
          ${wide && html`<div class="card detail">${detail}</div>`}
        </div>`}
  </div>`;
}

function summed(row) {
  const rewards = row.attempts.map((attempt) => attempt.reward).filter((reward) => reward !== undefined);
  const mean = rewards.length ? rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length : null;
  const spread = rewards.length ? Math.max(...rewards) - Math.min(...rewards) : 0;
  const said = row.attempts.flatMap((attempt) => [textOf(attempt.output), attempt.error ?? "", ...attempt.steps.map((step) => textOf(step.text))]);
  const text = [row.id, textOf(row.question), textOf(row.expected), ...new Set(said)].join("\n").toLowerCase();
  const fates = new Set(row.attempts.map((attempt) => attempt.dropped ?? "trained"));
  if (row.attempts.some((attempt) => attempt.error)) fates.add("error");
  return { ...row, mean, spread, text, fates };
}

function fateOptions(groups) {
  const fates = [...new Set(groups.flatMap((group) => [...group.fates]))].sort();
  const names = { trained: "trained on", error: "with an error", validation: "measured" };
  return [["all", "everything"], ...fates.map((fate) => [fate, names[fate] ?? `not trained on: ${fate}`])];
}

function matches(group, fate, search) {
  return (fate === "all" || group.fates.has(fate)) && group.text.includes(search.trim().toLowerCase());
}

function sorted(groups, order) {
  const value = { worst: (group) => group.mean ?? -Infinity, best: (group) => -(group.mean ?? -Infinity), spread: (group) => -group.spread }[order];
  return value ? [...groups].sort((one, other) => value(one) - value(other)) : groups;
}

function Group({ group, range, active, choose, detail }) {
  const isChosen = active?.row === group.id;
  const reasons = [...group.fates].filter((fate) => !["trained", "error", "validation"].includes(fate));
  return html`<article class="card group ${isChosen ? "chosen" : ""}">
    <header><span class="question clamp">${titleOf(group) || group.id}</span><${Reward} value=${group.mean} range=${range} /></header>
    <div class="facts"><span>${group.id}</span>${textOf(group.expected) && html` · wants ${shortened(textOf(group.expected), 120)}`}
      ${reasons.map((reason) => html`<span key=${reason} title=${DROP_REASONS[reason] ?? ""}> · not trained on: ${reason}</span>`)}</div>
    <div class="attempts" role="group" aria-label="Attempts">
      ${group.attempts.map((attempt) => html`<button type="button" key=${attempt.number} style=${rewardStyle(attempt.reward, range)}
        class=${attempt.dropped && attempt.dropped !== "validation" ? "dropped" : ""} title=${attemptTitle(attempt)}
        aria-pressed=${String(isChosen && active.attempt === attempt.number)}
        onClick=${() => choose({ row: group.id, attempt: attempt.number })}>${attempt.error ? "! " : ""}${attempt.reward === undefined ? "none" : fixed(attempt.reward, Number.isInteger(attempt.reward) ? 0 : 2)}</button>`)}
    </div>
    ${detail && html`<div class="inline-detail">${detail}</div>`}
  </article>`;
}

function attemptTitle(attempt) {
  const fate = attempt.dropped ? `not trained on: ${attempt.dropped}` : `advantage ${signed(attempt.advantage ?? 0)}`;
  return `attempt ${attempt.number + 1}, ${fate}\n${shortened(said(attempt), 160)}`;
}

function Detail({ group, number, collection }) {
  const attempt = group.attempts.find((each) => each.number === number) ?? group.attempts[0];
  const hasAdvantage = attempt.advantage !== undefined && !attempt.dropped;
  const [mode, setMode] = useState(hasAdvantage ? "advantage" : "surprise");
  const [chosen, setChosen] = useState(null);
  const largest = Math.max(...group.attempts.map((each) => Math.abs(each.advantage ?? 0)));
  const sampled = attempt.steps.some((step) => step.tokens);
  return html`<div>
    <div class="detail-head">
      <${Reward} value=${attempt.reward ?? null} range=${collection.run.range} />
      <span class="chip">attempt <b>${attempt.number + 1}</b> of ${group.attempts.length}</span>
      ${hasAdvantage && html`<span class="chip">advantage <b>${signed(attempt.advantage)}</b></span>`}
      ${attempt.versions?.length > 0 && html`<span class="chip">policy <b>${attempt.versions.join(", ")}</b></span>`}
      ${attempt.seconds !== undefined && html`<span class="chip">${duration(attempt.seconds)}</span>`}
      ${attempt.dropped && attempt.dropped !== "validation" && html`<span class="chip warn">not trained on: ${attempt.dropped}</span>`}
    </div>
    ${attempt.dropped && DROP_REASONS[attempt.dropped] && html`<p class="small muted" style="margin-bottom: 8px">${prose(DROP_REASONS[attempt.dropped])}</p>`}
    ${sampled && html`<${Segments} label="Colour the tokens by" options=${TOKEN_MODES} value=${mode} onChange=${setMode} />`}
    ${sampled && html`<${Scale} mode=${mode} />`}
    <${Transcript} attempt=${attempt} mode=${mode} largest=${largest} chosen=${chosen} onChoose=${setChosen} />
  </div>`;
}
