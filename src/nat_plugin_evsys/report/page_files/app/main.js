// The page as a whole: head, navigation, theme.

const THEMES = [["auto", "Auto"], ["light", "Light"], ["dark", "Dark"]];
const STATUS_TONES = { finished: "good", running: "", failed: "bad", interrupted: "warn" };

/** The theme in force, which follows the system until one is chosen. */
function useTheme() {
  const system = useMemo(() => window.matchMedia("(prefers-color-scheme: dark)"), []);
  const [choice, setChoice] = useState("auto");
  const [dark, setDark] = useState(system.matches);
  useEffect(() => {
    const look = () => setDark(system.matches);
    system.addEventListener("change", look);
    return () => system.removeEventListener("change", look);
  }, [system]);
  const theme = choice === "auto" ? (dark ? "dark" : "light") : choice;
  document.documentElement.dataset.theme = theme; // before the charts read its colours
  return [theme, choice, setChoice];
}

function App() {
  const [theme, choice, setChoice] = useTheme();
  return html`
    <header class="wrap head">
      <div style="min-width: 0"><div class="brand">evsys finetuning report</div>
        <h1>${runs.map((run) => run.name).join("  and  ")}</h1>
        <${Chips} /></div>
      <${Segments} label="Theme" options=${THEMES} value=${choice} onChange=${setChoice} />
    </header>
    <${Navigation} />
    <main class="wrap">
      <${Better} theme=${theme} />
      <${Changes} />
      <${Rollouts} />
      <${Health} theme=${theme} />
      <${Setup} />
    </main>
    <footer class="wrap foot">Made ${report.made} by nat_plugin_evsys ${report.version}. This file holds everything that it shows and reaches no network.</footer>`;
}

function Chips() {
  const run = runs[0];
  return html`<div class="chips">
    ${runs.map((each) => html`<span class=${`chip ${STATUS_TONES[each.status] ?? ""}`} key=${each.index}>${isComparison ? `${"AB"[each.index]} ` : ""}${each.status}, ${plural(each.epochs, "epoch")}</span>`)}
    ${run.model && html`<span class="chip">model <b>${[...new Set(runs.map((each) => each.model))].join(", ")}</b></span>`}
    ${run.workflow && html`<span class="chip">workflow <b>${[...new Set(runs.map((each) => each.workflow))].join(", ")}</b></span>`}
    ${run.reward && html`<span class="chip">reward <b>${[...new Set(runs.map((each) => each.reward))].join(", ")}</b></span>`}
    ${!isComparison && run.started && html`<span class="chip">${run.started.slice(0, 16).replace("T", " ")}</span>`}
  </div>`;
}

function Navigation() {
  const warnings = runs.reduce((sum, run) => sum + run.findings.length + run.health.filter((figure) => figure.state === "crossed").length, 0);
  const links = [["better", "1. Better?"], ["changed", "2. What changed"], ["why", "3. Why"], ["health", "4. Health"], ["setup", "5. With what"]];
  return html`<nav aria-label="Sections"><div class="wrap">${links.map(([id, text]) => html`<a href=${`#${id}`} key=${id}>${text}${id === "health" && warnings > 0 && html`<span class="count">${warnings}</span>`}</a>`)}</div></nav>`;
}

const root = document.getElementById("app");
root.replaceChildren(); // the note that the report is being read
render(html`<${App} />`, root);
