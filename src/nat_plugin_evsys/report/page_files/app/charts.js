// uPlot, dressed: colours of the theme, integer epochs, a tooltip, error bars.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function faded(name, percent) {
  return colour(name) + Math.round(2.55 * percent).toString(16).padStart(2, "0"); // colours are #rrggbb
}

/** A chart that follows its box's width and the theme. `build(width)` returns uPlot's options and data. */
function Chart({ build, theme, label }) {
  const box = useRef(null);
  useLayoutEffect(() => {
    let plot = null;
    let drawnWidth = 0;
    const draw = () => {
      const width = box.current.clientWidth;
      if (width === 0 || width === drawnWidth) return;
      drawnWidth = width;
      plot?.destroy();
      const { options, data } = build(width);
      plot = new uPlot(options, data, box.current);
    };
    const observer = new ResizeObserver(draw);
    observer.observe(box.current);
    draw();
    return () => { observer.disconnect(); plot?.destroy(); };
  }, [build, theme]);
  return html`<div class="chart" ref=${box} role="img" aria-label=${label}></div>`;
}

function axes({ yLabel = null, ySize = 52, compact = false } = {}) {
  const common = {
    stroke: colour("--muted"),
    grid: { stroke: colour("--line"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
  };
  const whole = (_, splits) => splits.map((value) => (Number.isInteger(value) ? value : null));
  return [
    { ...common, grid: { show: false }, values: whole, size: compact ? 22 : 30, space: compact ? 30 : 46, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] },
    { ...common, size: ySize, label: yLabel ?? undefined, labelSize: yLabel ? 18 : 0, labelFont: common.font, space: compact ? 26 : 42 },
  ];
}

/** A box beside the cursor with what `describe(index)` returns: a title and [colour, text] lines. */
function tooltip(describe) {
  let tip = null;
  return {
    hooks: {
      init: (plot) => {
        tip = document.createElement("div");
        tip.className = "tip";
        tip.hidden = true;
        plot.over.append(tip);
      },
      setCursor: (plot) => {
        const { idx, left } = plot.cursor;
        const lines = idx === null || idx === undefined || left < 0 ? null : describe(idx);
        tip.hidden = lines === null || lines.length < 2;
        if (tip.hidden) return;
        tip.replaceChildren(...lines.map((line, position) => tipLine(line, position === 0)));
        const x = plot.valToPos(plot.data[0][idx], "x");
        const flips = x > plot.over.clientWidth / 2;
        tip.style.transform = `translate(${flips ? x - tip.offsetWidth - 12 : x + 12}px, 8px)`;
      },
    },
  };
}

function tipLine(line, isTitle) {
  if (isTitle) return Object.assign(document.createElement("b"), { textContent: line });
  const [name, text] = line;
  const entry = document.createElement("div");
  const dot = document.createElement("i");
  dot.className = "dot";
  dot.style.setProperty("--colour", `var(${name})`);
  entry.append(dot, text);
  return entry;
}

/** Vertical bars from low to high at the points of some series. `bars`: [{series, low, high, stroke}]. */
function errorBars(bars) {
  return {
    hooks: {
      draw: (plot) => {
        const { ctx } = plot;
        ctx.save();
        ctx.lineWidth = 1.5 * devicePixelRatio;
        for (const { low, high, stroke } of bars) {
          ctx.strokeStyle = stroke;
          plot.data[0].forEach((x, index) => {
            if (low[index] === null || high[index] === null) return;
            const at = plot.valToPos(x, "x", true);
            const [top, bottom] = [high[index], low[index]].map((value) => plot.valToPos(value, "y", true));
            const cap = 3.5 * devicePixelRatio;
            ctx.beginPath();
            ctx.moveTo(at, top); ctx.lineTo(at, bottom);
            ctx.moveTo(at - cap, top); ctx.lineTo(at + cap, top);
            ctx.moveTo(at - cap, bottom); ctx.lineTo(at + cap, bottom);
            ctx.stroke();
          });
        }
        ctx.restore();
      },
    },
  };
}

/** A horizontal line across the chart. */
function ruler(value, stroke) {
  return {
    hooks: {
      draw: (plot) => {
        if (value < plot.scales.y.min || value > plot.scales.y.max) return;
        const { ctx, bbox } = plot;
        const y = plot.valToPos(value, "y", true);
        ctx.save();
        ctx.strokeStyle = stroke;
        ctx.lineWidth = devicePixelRatio;
        ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
        ctx.restore();
      },
    },
  };
}

function column(xs, points, field, x = "epochs") {
  const byX = new Map(points.map((point) => [point[x], point[field]]));
  return xs.map((value) => byX.get(value) ?? null);
}
