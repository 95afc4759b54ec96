// 1. Did it get better?

const SIGNS = { yes: "✓", no: "✕", unclear: "?", unmeasured: "?" };
const PART_COLOURS = {
  "warm start": "--muted", rollouts: "--run-a", training: "--run-b", "held-out scoring": "--good", "everything else": "--line",
};

function Better({ theme }) {
  return html`<section id="better">
    <h2>1. Did it get better?</h2>
    <p>The agent was scored on the same rows before and after training.</p>
    ${report.comparison && html`<div class="card verdict" style="margin-bottom: 8px"><p class="answer">${report.comparison}</p></div>`}
    ${runs.map((run) => html`<${Verdict} run=${run} key=${run.index} />`)}
    <div class="grid better">
      <div class="card">
        <h3>Reward over the epochs</h3>
        <${RewardLegend} />
        <${RewardChart} theme=${theme} />
      </div>
      <div class="grid" style="align-content: start">
        ${runs.map((run) => html`<${Figures} run=${run} key=${run.index} />`)}
      </div>
    </div>
  </section>`;
}

function Verdict({ run }) {
  const { answer, sentence } = run.verdict;
  const warnings = run.findings.length;
  return html`<div class="card verdict" style="margin-bottom: 8px">
    <div class="sign ${answer}" aria-hidden="true">${SIGNS[answer]}</div>
    <div>
      ${isComparison && html`<p class="small muted"><${RunName} run=${run} /></p>`}
      <p class="answer">${sentence}</p>
      ${run.error && html`<p class="error-text">The run ${run.status === "interrupted" ? "was interrupted" : run.status}: ${run.error}</p>`}
      ${warnings > 0 && html`<p><span class="chip warn">${plural(warnings, "warning")}</span> ${" "}
        <a href="#health">${prose(run.findings[0].sentence)}</a></p>`}
    </div>
  </div>`;
}

function RunName({ run }) {
  return html`<span style="display: inline-flex; gap: 6px; align-items: center; overflow-wrap: anywhere">
    <i class="dot" style=${`--colour: var(${run.colour})`}></i>${run.label}</span>`;
}

function Figures({ run }) {
  const { verdict, cost } = run;
  const rows = verdict.kind === "heldout" ? "Held-out reward" : "Reward on the training rows";
  return html`<div class="figures">
    ${isComparison && html`<div class="figure wide small"><${RunName} run=${run} /></div>`}
    <div class="figure wide">
      <div class="label">${rows}</div>
      <div class="value">${fixed(verdict.before?.mean)} <small>→</small> ${verdict.warm_start && html`${fixed(verdict.warm_start.mean)} <small>→</small>`} ${fixed(verdict.after?.mean)}
        ${verdict.change && !verdict.since_warm_start && html` <${Change} value=${verdict.change.mean} />`}</div>
      ${verdict.warm_start && html`<div class="note">base model → after the warm start → after training</div>`}
      <${Gain} of=${verdict.since_warm_start && "in all"} change=${verdict.change} />
      <${Gain} of="since the warm start" change=${verdict.since_warm_start} />
    </div>
    <div class="figure wide better-rows">
      <div class="label">Rows that got</div>
      <div><b class="up">${verdict.rows.better}</b> better · <b class="down">${verdict.rows.worse}</b> worse ·
        ${" "}<b>${verdict.rows.same}</b> the same</div>
    </div>
    <${Count} label="Rollouts" value=${cost.rollouts} note=${plural(cost.calls, "LLM call")} />
    <${Count} label="Tokens sampled" value=${cost.sampled_tokens} note=${`${count(cost.trained_tokens)} trained on`} />
    <${Count} label="Optimizer steps" value=${cost.steps} note=${plural(run.epochs, "epoch")} />
    <div class="figure"><div class="label">Time</div><div class="value">${duration(cost.seconds)}</div></div>
    <${Time} cost=${cost} />
  </div>`;
}

/** The bounds of a change; where it says what it is the change `of`, its mean too. */
function Gain({ of, change }) {
  if (!change) return null;
  return html`<div class="note">${of && html`${of} <${Change} value=${change.mean} />, `}95% interval ${signed(change.low, 2)} to
    ${" "}${signed(change.high, 2)}, ${plural(change.count, "row")}</div>`;
}

function Change({ value }) {
  return html`<small class=${value > 0 ? "up" : value < 0 ? "down" : ""}>${signed(value)}</small>`;
}

function Count({ label, value, note }) {
  return html`<div class="figure"><div class="label">${label}</div><div class="value">${count(value)}</div>
    <div class="note">${note}</div></div>`;
}

function Time({ cost }) {
  const total = cost.parts.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (total === 0) return null;
  return html`<div class="figure wide">
    <div class="label">Where the time went</div>
    <div class="timebar">${cost.parts.map(
      ([what, seconds]) => html`<i key=${what} title=${`${what}: ${duration(seconds)}`}
        style=${`flex: ${seconds}; background: var(${PART_COLOURS[what]})`}></i>`,
    )}</div>
    <div class="legend">${cost.parts.map(
      ([what, seconds]) => html`<span key=${what}><i class="dot" style=${`--colour: var(${PART_COLOURS[what]})`}></i>
        ${what} ${share(seconds / total)}</span>`,
    )}</div>
  </div>`;
}

/** Colours of the curve: by run where there are two, else by what was measured. */
function curveColours(run) {
  return isComparison ? [run.colour, run.colour] : ["--run-a", "--run-b"];
}

function RewardLegend() {
  const entries = isComparison
    ? runs.map((run) => [run.colour, `${"AB"[run.index]}: solid training, dashed held-out`])
    : [["--run-a", "training rollouts: mean and one standard deviation"], ["--run-b", "held-out rows: mean and 95% interval"],
        ...(runs[0].curve.base.length > 0 ? [["--muted", "the same, of the base model"]] : [])];
  return html`<div class="legend" style="margin-bottom: 8px">${entries.map(
    ([name, text]) => html`<span key=${text}><i class="dot" style=${`--colour: var(${name})`}></i>${text}</span>`,
  )}</div>`;
}

function RewardChart({ theme }) {
  const hasPoints = runs.some((run) => run.curve.training.length + run.curve.heldout.length > 0);
  if (!hasPoints) return html`<p class="empty">No reward has been measured yet.</p>`;
  return html`<${Chart} build=${rewardChart} theme=${theme} label="Reward over the epochs" />`;
}

function rewardChart(width) {
  const xs = [...new Set(runs.flatMap((run) => [...run.curve.training, ...run.curve.heldout].map((p) => p.epochs)))];
  xs.sort((one, other) => one - other);
  const data = [xs];
  const series = [{}];
  const bands = [];
  const bars = [];
  for (const run of runs) {
    const [training, heldout] = curveColours(run);
    const drawn = run.curve.training;
    data.push(column(xs, drawn, "high"), column(xs, drawn, "low"), column(xs, drawn, "mean"));
    const edge = { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
    series.push(edge, edge);
    bands.push({ series: [series.length - 2, series.length - 1], fill: faded(training, isComparison ? 9 : 15) });
    const dots = { show: drawn.length < 60, size: 5, fill: colour(training) };
    series.push({ stroke: colour(training), width: lineWidth(run), spanGaps: true, points: dots });
    const measured = run.curve.heldout;
    data.push(column(xs, measured, "mean"));
    series.push({ stroke: colour(heldout), width: lineWidth(run), dash: [5, 4], spanGaps: true, points: { show: true, size: 9, fill: colour(heldout) } });
    bars.push({ low: column(xs, measured, "low"), high: column(xs, measured, "high"), stroke: colour(heldout) });
    if (run.curve.base.length > 0) {
      const base = isComparison ? heldout : "--muted";
      data.push(column(xs, run.curve.base, "mean"));
      bars.push({ low: column(xs, run.curve.base, "low"), high: column(xs, run.curve.base, "high"), stroke: colour(base) });
      series.push({ stroke: colour(base), width: 0, points: { show: true, size: 9, fill: colour(base) } });
    }
  }
  const low = Math.min(...runs.map((run) => run.range[0]));
  const high = Math.max(...runs.map((run) => run.range[1]));
  const margin = 0.04 * (high - low);
  const options = {
    width,
    height: width < 500 ? 260 : isComparison || runs[0].verdict.since_warm_start ? 460 : 392, // as high as its neighbour
    scales: { x: { time: false, range: (_, min, max) => [min - 0.15, Math.max(max, min + 1) + 0.15] }, y: { range: [low - margin, high + margin] } },
    axes: axes({ ySize: 44 }),
    series,
    bands,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
    plugins: [errorBars(bars), tooltip((index) => rewardLines(xs[index]))],
  };
  options.axes[0].label = "epochs trained";
  options.axes[0].labelSize = 20;
  options.axes[0].labelFont = options.axes[0].font;
  return { options, data };
}

/** A's lines are wide enough to be seen under B's where both lie on one another. */
function lineWidth(run) {
  return isComparison && run.index === 0 ? 5 : 2;
}

function rewardLines(epochs) {
  const lines = [isComparison && epochs === 0 ? "before training" : policyName(runs[0], epochs)];
  for (const run of runs) {
    const [training, heldout] = curveColours(run);
    const name = isComparison ? `${"AB"[run.index]} ` : "";
    const drawn = run.curve.training.find((point) => point.epochs === epochs);
    const measured = run.curve.heldout.find((point) => point.epochs === epochs);
    const base = run.curve.base.find((point) => point.epochs === epochs);
    if (base) lines.push([isComparison ? heldout : "--muted", `${name}base model, held-out ${fixed(base.mean)} (${fixed(base.low, 2)} to ${fixed(base.high, 2)})`]);
    if (drawn) lines.push([training, `${name}training ${fixed(drawn.mean)}`]);
    if (measured) lines.push([heldout, `${name}held-out ${fixed(measured.mean)} (${fixed(measured.low, 2)} to ${fixed(measured.high, 2)})`]);
  }
  return lines;
}
