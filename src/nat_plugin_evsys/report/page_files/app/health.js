// 4. Is it healthy? What a person should look at, then every figure over the epochs.

const HEALTH_STATES = { ok: ["good", "fine"], crossed: ["warn", "look at this"], not_measured: ["", "not measured"] };
const healthCursor = window.uPlot.sync("health");

function Health({ theme }) {
  const titles = runs[0].health.map((figure) => figure.title);
  const measured = titles.filter((title) => figuresOf(title).some((figure) => figure.points.length));
  const missing = runs[0].health.filter((figure) => !measured.includes(figure.title));
  return html`<section id="health">
    <h2>4. Is it healthy?</h2>
    <p>A reward can rise for the wrong reasons, and training can break without a sound. A dashed line is the threshold of a figure.</p>
    <div class="grid">${runs.flatMap((run) => run.findings.map((finding) => html`<${Finding} run=${run} finding=${finding} key=${run.index + finding.id} />`))}</div>
    <div class="grid health">${measured.map((title) => html`<${HealthCard} title=${title} theme=${theme} key=${title} />`)}</div>
    ${missing.length > 0 && html`<p class="unmeasured muted">Not measured: ${missing.map(
      (figure, index) => html`<span key=${figure.title}>${index > 0 && ", "}<span title=${`${figure.meaning} Looked for ${figure.names.join(", ")} in metrics.jsonl.`}>${figure.title}</span></span>`,
    )}.</p>`}
  </section>`;
}

function figuresOf(title) {
  return runs.map((run) => run.health.find((figure) => figure.title === title));
}

function Finding({ run, finding }) {
  return html`<div class="card finding">
    ${isComparison && html`<p class="small muted"><${RunName} run=${run} /></p>`}
    <p class="lead">${prose(finding.sentence)}</p>
    <p class="muted">${prose(finding.advice)}</p>
    ${finding.epochs.length > 1 && html`<p class="small muted">Seen in ${plural(finding.epochs.length, "epoch")}: ${finding.epochs.join(", ")}.</p>`}
    <div class="examples">${finding.examples.map((reply, index) => html`<div class="example" key=${index}>
      <${Reward} value=${reply.reward} range=${run.range} /> ${" "}<b>${reply.text || "(nothing)"}</b>
      <span class="muted"> to “${reply.question}”${reply.expected ? `, which wants “${reply.expected}”` : ""}${reply.verdict ? `; ${reply.verdict}` : ""}</span>
    </div>`)}</div>
  </div>`;
}

function healthText(figure, value) {
  if (figure.unit === "%") return share(value, figure.digits);
  const text = figure.digits === 0 ? count(value) : fixed(value, figure.digits);
  return figure.unit ? `${text} ${figure.unit}` : text;
}

function HealthCard({ title, theme }) {
  const figures = figuresOf(title);
  const state = figures.some((figure) => figure.state === "crossed") ? "crossed" : "ok";
  const [tone, word] = HEALTH_STATES[state];
  const one = figures[0];
  const build = useMemo(() => (width) => healthChart(figures, width), [title]);
  const earlier = figures.some((figure) => figure.state !== "crossed" && figure.crossed_in.length);
  return html`<article class="card" data-state=${state}>
    <header><h3>${title}</h3>${figures.some((figure) => figure.bound !== null) && html`<span class="chip ${tone}">${word}</span>`}</header>
    ${figures.map((figure, index) => figure.points.length > 0 && html`<div class="now" key=${index}>
      ${isComparison && html`<small>${"AB"[index]} </small>`}${healthText(figure, figure.points.at(-1)[1])}</div>`)}
    ${figures.map((figure, index) => figure.bound !== null && (index === 0 || healthText(figure, figure.bound) !== healthText(one, one.bound ?? 0)) && html`<div class="should" key=${index}>
      should stay ${figure.side === "above" ? "below" : "above"} ${healthText(figure, figure.bound)}</div>`)}
    <${Chart} build=${build} theme=${theme} label=${`${title} over the epochs`} />
    <p class="meaning">${one.meaning}</p>
    ${state === "crossed" && html`<p class="crossing">${prose(one.crossed)}</p>`}
    ${state !== "crossed" && earlier && html`<p class="small muted">Crossed in ${figures.map((figure) => figure.crossed_in).flat().map((epoch) => `epoch ${epoch}`).slice(0, 6).join(", ")}.</p>`}
  </article>`;
}

function healthChart(figures, width) {
  const xs = [...new Set(figures.flatMap((figure) => figure.points.map(([epoch]) => epoch)))].sort((one, other) => one - other);
  const data = [xs];
  const series = [{}];
  figures.forEach((figure, index) => {
    const values = new Map(figure.points);
    data.push(xs.map((x) => values.get(x) ?? null));
    const stroke = colour(runs[index].colour);
    series.push({ stroke, width: lineWidth(runs[index]), spanGaps: true, points: { show: xs.length < 40, size: 4, fill: stroke } });
  });
  const bounds = figures.map((figure) => figure.bound).filter((bound) => bound !== null);
  const values = data.slice(1).flat().filter((value) => value !== null);
  const reach = Math.max(...values.map(Math.abs), 0);
  const figure = figures[0];
  // a threshold far away would flatten the curve, unless the curve is flat
  const near = bounds.filter((bound) => reach === 0 || Math.abs(bound) < 4 * reach);
  const least = figure.unit === "%" ? 0.1 : 10 ** -figure.digits; // nothing smaller is shown of a value
  const [low, high] = [Math.min(0, ...values, ...near), Math.max(...values, ...near, least)];
  const options = {
    width,
    height: 118,
    scales: { x: { time: false, range: (_, min, max) => [min - 0.2, Math.max(max, min + 1) + 0.2] }, y: { range: [low, low + 1.1 * (high - low)] } },
    axes: axes({ compact: true, ySize: 46 }),
    series,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 }, sync: { key: healthCursor.key, setSeries: false } },
    plugins: [...near.map((bound) => ruler(bound, colour("--warn"))), tooltip((index) => [
      `epoch ${xs[index]}`,
      ...figures.flatMap((each, run) => (data[run + 1][index] === null ? [] : [[runs[run].colour, healthText(each, data[run + 1][index])]])),
    ])],
  };
  options.axes[1].values = (_, splits) => splits.map((value) => (figure.unit === "%" ? share(value) : compactNumber(value)));
  return { options, data };
}

function compactNumber(value) {
  return Math.abs(value) >= 10000 ? `${value / 1000}k` : String(Number(value.toPrecision(4)));
}
