// The report's data: what is shown at once is JSON, rollouts are decoded when a section asks for them.

const report = JSON.parse(document.getElementById("report-data").textContent);
const runs = report.runs;
const isComparison = runs.length > 1;
const RUN_COLOURS = ["--run-a", "--run-b"];

runs.forEach((run, index) => {
  run.index = index;
  run.label = isComparison ? `${"AB"[index]}: ${run.name}` : run.name;
  run.colour = RUN_COLOURS[index];
  run.collections.forEach((collection) => {
    collection.run = run;
    collection.key = `${index}/${collection.kind}/${collection.epoch}`;
  });
});

/** The collections of one kind, oldest first. */
function collectionsOf(run, kind) {
  return run.collections.filter((collection) => collection.kind === kind);
}

/** The collections that are tried on the same rows: of held-out rows also those before a warm start. */
function measuredCollections(run) {
  const kind = measuredKind(run);
  return kind === "heldout" ? [...collectionsOf(run, "base"), ...collectionsOf(run, kind)] : collectionsOf(run, kind);
}

/** The rows that show the change: held-out ones, or the training rows where there are no others. */
function measuredKind(run) {
  return collectionsOf(run, "heldout").length > 0 ? "heldout" : "train";
}

const decoding = new Map();

/** The rows of a collection; decoded once. */
function rowsOf(collection) {
  if (!decoding.has(collection.element)) decoding.set(collection.element, decode(collection.element));
  return decoding.get(collection.element);
}

async function decode(element) {
  if (!("DecompressionStream" in window)) {
    throw new Error("this browser is too old to read the rollouts; use Chrome 80, Firefox 113, Safari 16.4 or newer");
  }
  const binary = atob(document.getElementById(element).textContent);
  const bytes = new Uint8Array(binary.length);
  for (let index = 0; index < binary.length; index += 1) bytes[index] = binary.charCodeAt(index);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return (await new Response(stream).json()).rows;
}

/** `{rows}`, `{error}` or, while it is being read, `{}`. Without a collection there are no rows. */
function useRows(collection) {
  const [state, setState] = useState({});
  const key = collection?.element ?? null;
  useEffect(() => {
    let current = true;
    setState({});
    if (key === null) return undefined;
    rowsOf(collection).then(
      (rows) => current && setState({ key, rows }),
      (error) => current && setState({ key, error: String(error.message ?? error) }),
    );
    return () => { current = false; };
  }, [key]);
  return state.key === key ? state : {};
}

/** From the lowest to the highest reward that a run shows, at least from 0 to 1. */
function rewardRange(run) {
  const seen = [...run.curve.training, ...run.curve.heldout, ...run.curve.base].flatMap((point) => [point.low, point.high]);
  return [Math.min(0, ...seen), Math.max(1, ...seen)];
}
runs.forEach((run) => { run.range = rewardRange(run); });

function collectionName(collection) {
  const { kind, epoch, run } = collection;
  if (kind === "epoch") return `epoch ${epoch}`;
  if (kind === "base") return "base model";
  return policyName(run, epoch);
}

/** The policy with so many epochs behind it. */
function policyName(run, epochs) {
  if (epochs > 0) return `after ${plural(epochs, "epoch")}`;
  return collectionsOf(run, "base").length > 0 ? "after the warm start" : "before training";
}
