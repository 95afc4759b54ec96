// 5. With what? Settings, versions, seeds, and the command that repeats it.

function Setup() {
  return html`<section id="setup">
    <h2>5. With what?</h2>
    <p>What it takes to make this run again.</p>
    ${isComparison && html`<${Differences} />`}
    <div class="grid setup">${runs.map((run) => html`
      <${Column} joined=${isComparison} key=${run.index}>
        <${Facts} run=${run} />
        <div class="grid"><${Repeat} run=${run} /><${Settings} run=${run} /></div>
      <//>`)}
    </div>
  </section>`;
}

/** Of two runs each has a column; the parts of a single run stand side by side. */
function Column({ joined, children }) {
  return joined ? html`<div class="grid">${children}</div>` : children;
}

function Settings({ run }) {
  return html`<div class="card"><h3>Settings</h3>
    <details><summary>every setting, defaults included (config.yml)</summary><pre>${run.config}</pre></details></div>`;
}

function Differences() {
  const [a, b] = runs.map((run) => run.settings);
  const names = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort();
  const changed = names.filter((name) => JSON.stringify(a[name]) !== JSON.stringify(b[name]));
  return html`<div class="card" style="margin-bottom: 14px"><h3>Settings that differ</h3>
    ${changed.length === 0
      ? html`<p class="muted">None: both runs have the same settings.</p>`
      : html`<table><thead><tr><th>setting</th>${runs.map((run) => html`<th key=${run.index}><${RunName} run=${run} /></th>`)}</tr></thead>
          <tbody>${changed.map((name) => html`<tr key=${name}><td class="mono">${name}</td><td class="mono">${shownSetting(a, name)}</td><td class="mono">${shownSetting(b, name)}</td></tr>`)}</tbody></table>`}
  </div>`;
}

function shownSetting(settings, name) {
  return name in settings ? textOf(settings[name]) : "not set";
}

function Facts({ run }) {
  const session = run.sessions.at(-1);
  const facts = [
    ["base model", run.model], ["workflow", run.workflow], ["reward", run.reward], ["began", run.started],
    ["directory", run.path], ["Python", session?.python], ["machine", session && `${session.platform}, ${plural(session.processors, "processor")}`],
  ].filter(([, value]) => value);
  return html`<div class="card"><h3>${isComparison ? html`<${RunName} run=${run} />` : "What ran"}</h3>
    <dl class="facts-list">${facts.map(([name, value]) => html`<dt key=${name}>${name}</dt><dd key=${`${name}=`}>${value}</dd>`)}</dl>
    ${session && html`<table style="margin-top: 10px"><thead><tr><th>package</th><th>version</th></tr></thead>
      <tbody>${Object.entries(session.packages).map(([name, version]) => html`<tr key=${name}><td>${name}</td><td class="number">${version}</td></tr>`)}</tbody></table>`}
  </div>`;
}

function Repeat({ run }) {
  const commands = run.sessions.map((session) => session.command);
  const seeds = Object.entries(run.seeds);
  return html`<div class="card"><h3>Repeat it</h3>
    ${commands.length === 0 && html`<${Command} text=${`nat finetune --config_file ${run.path}/config.yml`} />`}
    ${commands.map((command, index) => html`<${Command} text=${command} key=${index} />`)}
    ${commands.length > 1 && html`<p class="small muted">The run was resumed; the commands stand in their order.</p>`}
    ${seeds.length > 0 && html`<table style="margin-top: 12px"><thead><tr><th>seed</th><th>value</th></tr></thead>
      <tbody>${seeds.map(([name, value]) => html`<tr key=${name}><td class="mono">${name}</td><td class="number">${value}</td></tr>`)}</tbody></table>`}
  </div>`;
}

function Command({ text }) {
  const [copied, setCopied] = useState(false);
  const copy = () => navigator.clipboard?.writeText(text).then(() => setCopied(true), () => setCopied(false));
  return html`<div><pre class="command">${text}</pre>
    <button type="button" class="link" onClick=${copy}>${copied ? "Copied" : "Copy"}</button></div>`;
}
