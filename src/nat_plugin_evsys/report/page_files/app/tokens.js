// A conversation, and its sampled tokens: what training said of each, and how far the policy moved on it.

const TOKEN_MODES = [["advantage", "Advantage"], ["moved", "Policy moved"], ["surprise", "Surprise"], ["plain", "Plain"]];

const MODE_HELP = {
  advantage: ["less likely from now on", "more likely from now on", "down", "up",
    "How much better or worse than the other attempts at this row the attempt was. Training makes all its tokens more likely, or less."],
  moved: ["became less likely", "became more likely", "down", "up",
    "The log-ratio: how much likelier the token had already become when it was trained on, compared with when it was sampled."],
  surprise: ["certain", "surprising", null, "far", "How unlikely the token was when it was sampled."],
};

/** How strongly a token is coloured, from -1 (left end of the scale) to 1, or null where there is nothing to show. */
function tokenStrength(mode, step, index, largest) {
  const { tokens, advantage } = step;
  if (mode !== "surprise" && isForced(step, index)) return null;
  if (mode === "advantage") return advantage === undefined || step.dropped ? null : advantage / (largest || 1);
  if (mode === "moved") return tokens.l ? clamp((tokens.l[index] - tokens.p[index]) / 500) : null;
  if (mode === "surprise") return clamp(-tokens.p[index] / 4000);
  return null;
}

/** Whether a grammar left no other token than this one of a call that was trained on. */
function isForced({ tokens }, index) {
  return tokens.l?.[index] === null;
}

function clamp(value) {
  return Math.max(-1, Math.min(1, value));
}

function tokenStyle(mode, strength) {
  if (strength === null || Math.abs(strength) < 0.02) return undefined;
  const name = mode === "surprise" ? "--far" : strength > 0 ? "--up" : "--down";
  return `background: rgba(var(${name}), ${(0.1 + 0.5 * Math.abs(strength)).toFixed(2)})`;
}

function Scale({ mode }) {
  if (mode === "plain") return null;
  const [low, high, from, to, help] = MODE_HELP[mode];
  const start = from ? `rgba(var(--${from}), .6), transparent 50%` : "transparent";
  return html`<div><div class="scale">${low}<i style=${`background: linear-gradient(90deg, ${start}, rgba(var(--${to}), .6))`}></i>${high}</div>
    <p class="small muted" style="margin-top: 2px">${help}</p></div>`;
}

/** The messages of an attempt. `chosen`: [step, token] or null; `onChoose` makes tokens clickable. */
function Transcript({ attempt, mode, largest = 1, chosen = null, onChoose = null }) {
  return html`<div>
    ${attempt.steps.map((step, position) => html`<${Step} key=${position} step=${step} mode=${mode} largest=${largest}
      chosen=${chosen !== null && chosen[0] === position ? chosen[1] : null}
      onChoose=${onChoose && ((token) => onChoose(token === null ? null : [position, token]))} />`)}
    ${attempt.steps.length === 0 && html`<p class="muted">The workflow made no call to the policy.</p>`}
    <${Judgement} attempt=${attempt} />
  </div>`;
}

function Step({ step, mode, largest, chosen, onChoose }) {
  const notes = [
    step.tokens && plural(step.tokens.i.length, "token"),
    step.version !== undefined && `policy ${step.version}`,
    step.cut && "cut off at max_tokens",
    step.copied && "not sampled in this run",
    step.conversation && `conversation ${step.conversation + 1}`,
    step.tokens && step.dropped && step.dropped !== "validation" && `not trained on: ${step.dropped}`,
  ].filter(Boolean);
  const asTokens = step.tokens?.t && onChoose;
  return html`<div class="step ${step.role}">
    <div class="role">${step.role} <em>${notes.join(" · ")}</em></div>
    ${asTokens
      ? html`<${Tokens} step=${step} mode=${mode} largest=${largest} chosen=${chosen} onChoose=${onChoose} />`
      : step.text && html`<div class="body">${step.text}</div>`}
    ${asTokens && chosen !== null && html`<${TokenFacts} step=${step} index=${chosen} />`}
    ${(step.calls ?? []).map((call, index) => html`<${ToolCall} call=${call} key=${index} />`)}
    ${(step.results ?? []).map((result, index) => html`<div class="call" key=${index}>${textOf(result)}</div>`)}
  </div>`;
}

function ToolCall({ call }) {
  return html`<div class="call mono"><b>${call.name}</b>(${textOf(call.arguments)})
    ${call.results.map((result, index) => html`<div class="answer" key=${index}>${textOf(result)}</div>`)}
  </div>`;
}

/** One element listens for all tokens; the arrow keys go from one to the next. */
function Tokens({ step, mode, largest, chosen, onChoose }) {
  const { t: texts } = step.tokens;
  const onClick = (event) => {
    const index = event.target.closest("[data-token]")?.dataset.token;
    if (index !== undefined) onChoose(Number(index) === chosen ? null : Number(index));
  };
  const onKeyDown = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") onChoose(null);
    if (move === undefined) return;
    event.preventDefault();
    onChoose(chosen === null ? 0 : Math.max(0, Math.min(texts.length - 1, chosen + move)));
  };
  return html`<div class="body tokens" tabindex="0" role="listbox" aria-label="Sampled tokens; arrow keys choose one"
    onClick=${onClick} onKeyDown=${onKeyDown}>
    ${texts.map((text, index) => html`<span key=${index} data-token=${index} role="option"
      aria-selected=${String(index === chosen)} class=${tokenClass(text, index === chosen)}
      style=${tokenStyle(mode, tokenStrength(mode, step, index, largest))}>${shownToken(text)}</span>`)}
  </div>`;
}

function tokenClass(text, isChosen) {
  return [isChosen && "chosen", /^<[|/]?[\w|▁-]+[|]?>$/.test(text) && "control"].filter(Boolean).join(" ");
}

/** Text of a token, with signs for what would not be seen. */
function shownToken(text) {
  if (text === "") return "·";
  return text.replace(/\n/g, "↵\n").replace(/\t/g, "→\t");
}

function TokenFacts({ step, index }) {
  const { t: texts, i: ids, p: sampled, l: learner } = step.tokens;
  const before = Math.exp(sampled[index] / 1000);
  const forced = isForced(step, index);
  const trained = !step.dropped && step.advantage !== undefined && step.advantage !== 0;
  return html`<div class="token-facts" aria-live="polite">
    <b class="mono">${JSON.stringify(texts[index])}</b> ${" "}<span class="muted small">token ${index + 1} of ${ids.length}, id ${ids[index]}</span>
    <dl>
      <dt>when sampled</dt><dd>${probability(before)} <span class="muted">(logprob ${fixed(sampled[index] / 1000)})</span></dd>
      ${learner && !forced && html`<dt>when trained on</dt><dd>${probability(Math.exp(learner[index] / 1000))}
        <span class="muted"> (log-ratio ${signed((learner[index] - sampled[index]) / 1000)})</span></dd>`}
      ${step.advantage !== undefined && html`<dt>advantage</dt><dd>${signed(step.advantage)}</dd>`}
      <dt>training</dt><dd>${forced ? FORCED : trained ? trainedSentence(step.advantage) : untrainedSentence(step)}</dd>
    </dl>
  </div>`;
}

function probability(value) {
  return value >= 0.001 ? `${(100 * value).toPrecision(3)}% likely` : `1 in ${count(1 / value)}`;
}

const FORCED = "Not trained on: the form that the reply was held to allowed no other token here.";

function trainedSentence(advantage) {
  return advantage > 0
    ? "The attempt did better than the others, so this token was made more likely here."
    : "The attempt did worse than the others, so this token was made less likely here.";
}

function untrainedSentence(step) {
  if (step.dropped === "validation" || step.dropped === undefined) {
    return step.advantage === 0 ? "The attempt was exactly average, so it changed nothing." : "Not trained on: this rollout only measures the policy.";
  }
  return prose(`Not trained on: ${DROP_REASONS[step.dropped] ?? step.dropped}`);
}

function Judgement({ attempt }) {
  const reasoning = linesOf(attempt.reasoning);
  return html`<div class="verdict-box">
    <dl class="facts-list">
      ${textOf(attempt.output) && html`<dt>answer</dt><dd class="said">${textOf(attempt.output)}</dd>`}
      <dt>reward</dt><dd>${attempt.reward === undefined ? "none" : fixed(attempt.reward)}</dd>
      ${reasoning && html`<dt>evaluator</dt><dd class="said">${reasoning}</dd>`}
      ${attempt.error && html`<dt>error</dt><dd class="error-text">${attempt.error}</dd>`}
    </dl>
  </div>`;
}
