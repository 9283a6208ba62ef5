(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const NUM_COLOURS = 8;
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const SVG_DASHES = ["", "7 4", "2 3", "7 3 2 3"];
  // Points of a curve up to which each is marked: of evaluations, which are few, and of all others.
  const MARK_EVALUATIONS_UP_TO = 60;
  const MARK_UP_TO = 12;
  // Points from which a curve is drawn thinner.
  const THIN_FROM = 500;
  const AXES = { step: "Step", tokens: "Tokens", hours: "Hours of training" };
  const compares = data.runs.length > 1;
  const darkPreferred = matchMedia("(prefers-color-scheme: dark)");
  const isCoarse = matchMedia("(pointer: coarse)").matches;
  const starting = (key) => Object.keys(data.panels).filter((id) => data.panels[id][key]);
  const state = { axis: "step", smoothing: 0, hiddenRuns: new Set(), hiddenLines: new Set(), log: new Set(starting("log")), drags: !isCoarse };

  // Custom properties hold light-dark(); only a property that is a colour says which of the two it is.
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };
  const seriesColour = (index) => colour(`series-${index % NUM_COLOURS}`);

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : darkPreferred.matches);
  const remembered = {
    get() { try { return localStorage.getItem("shardline-theme"); } catch { return null; } },
    set(theme) { try { localStorage.setItem("shardline-theme", theme); } catch { /* A file page may have no storage. */ } },
  };

  // Exponential moving average, corrected for its start as Adam's moments are.
  function smooth(values, weight) {
    let sum = 0;
    let mass = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  }

  function trace(run, rows, values, style) {
    const at = run.axes[state.axis];
    const kept = rows.map((_, index) => index).filter((index) => at[rows[index]] !== null);
    return {
      type: "scatter",
      mode: "lines",
      x: kept.map((index) => at[rows[index]]),
      y: kept.map((index) => values[index]),
      customdata: kept.map((index) => run.axes.step[rows[index]]),
      connectgaps: false,
      ...style,
    };
  }

  function traces(id) {
    const panel = data.panels[id];
    const found = [];
    data.runs.forEach((run, runIndex) => {
      panel.lines.forEach((line, lineIndex) => {
        const series = run.series[line.metric];
        if (!series || state.hiddenRuns.has(runIndex) || state.hiddenLines.has(`${id} ${lineIndex}`)) return;
        const ink = seriesColour(compares ? runIndex : lineIndex);
        const name = [compares ? shorten(run.label) : "", panel.lines.length > 1 || !compares ? line.label : ""].filter(Boolean).join(", ");
        const smooths = state.smoothing > 0 && line.smooth && series.values.length > 2;
        const stepText = state.axis === "step" ? "" : " at step %{customdata:,}";
        const style = {
          name: escapeText(name),
          line: { color: ink, width: series.values.length < THIN_FROM ? 2 : 1.25, dash: compares ? DASHES[lineIndex % DASHES.length] : "solid" },
          hovertemplate: `%{y}${stepText}`,
          // Shares add up to 1; of several runs they would lie upon one another.
          ...(panel.stacked && !compares ? { stackgroup: "shares" } : {}),
        };
        if (series.values.length <= (line.marked ? MARK_EVALUATIONS_UP_TO : MARK_UP_TO)) {
          Object.assign(style, { mode: "lines+markers", marker: { color: ink, size: 6 } });
        }
        if (smooths) {
          const faint = { ...style, mode: "lines", opacity: 0.28, hoverinfo: "skip", hovertemplate: undefined, line: { ...style.line, width: 1 } };
          found.push(trace(run, series.rows, series.values, faint));
          const values = smooth(series.means ?? series.values, state.smoothing);
          found.push(trace(run, series.mean_rows ?? series.rows, values, { ...style, mode: "lines", line: { ...style.line, width: 2 } }));
        } else {
          found.push(trace(run, series.rows, series.values, style));
        }
      });
    });
    return found;
  }

  // Names beside a pointer must leave room for the plot.
  function shorten(text) {
    const room = innerWidth < 640 ? 16 : 40;
    const kept = Math.floor(room / 2) - 1;
    return text.length <= room ? text : `${text.slice(0, kept)}...${text.slice(-kept)}`;
  }
  // Plotly reads a subset of HTML in names.
  const escapeText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function layout(id) {
    const panel = data.panels[id];
    const isLog = state.log.has(id);
    const axis = {
      color: colour("muted"),
      gridcolor: colour("line"),
      linecolor: colour("edge"),
      zeroline: false,
      ticks: "outside",
      ticklen: 4,
      tickcolor: colour("line"),
      automargin: true,
      exponentformat: "SI",
      separatethousands: true,
    };
    const title = (text) => ({ text, font: { size: 12, color: colour("muted") }, standoff: 8 });
    return {
      margin: { l: 48, r: 12, t: 8, b: 40 },
      autosize: true,
      showlegend: false,
      paper_bgcolor: colour("surface"),
      plot_bgcolor: colour("surface"),
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("ink") },
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("surface"), bordercolor: colour("edge"), font: { color: colour("ink"), size: innerWidth < 640 ? 11 : 13 }, namelength: 40 },
      dragmode: state.drags ? "zoom" : false,
      uirevision: `${state.axis} ${isLog}`,
      xaxis: {
        ...axis,
        title: title(AXES[state.axis]),
        showgrid: false,
        nticks: 7,
        spikecolor: colour("muted"),
        spikethickness: 1,
        spikedash: "dot",
        unifiedhovertitle: { text: { step: "step %{x:,}", tokens: "%{x:,} tokens", hours: "%{x:.3f} hours" }[state.axis] },
      },
      yaxis: {
        ...axis,
        title: title(panel.unit),
        type: isLog ? "log" : "linear",
        nticks: 6,
        // SI would write 0.0004 as 400 micro.
        exponentformat: panel.small ? "e" : "SI",
        rangemode: panel.nonnegative ? "nonnegative" : "normal",
        tickformat: panel.tick_format,
        hoverformat: panel.tick_format ? ".4~p" : ".5~g",
      },
    };
  }

  const CONFIG = {
    responsive: true,
    displaylogo: false,
    // They would cover the theme button.
    showTips: false,
    displayModeBar: isCoarse ? false : "hover",
    modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
    doubleClick: "reset",
  };

  // Only what is near the window is drawn: a page of many long runs opens at once.
  const near = new Set();
  const stale = new Set(all(".plot"));
  function draw(plot) {
    stale.delete(plot);
    Plotly.react(plot, traces(plot.dataset.panel), layout(plot.dataset.panel), CONFIG);
  }
  function redraw(plots = all(".plot")) {
    plots.forEach((plot) => (near.has(plot) ? draw(plot) : stale.add(plot)));
  }
  const watcher = new IntersectionObserver(
    (entries) =>
      entries.forEach(({ target, isIntersecting }) => {
        if (isIntersecting) near.add(target);
        else near.delete(target);
        if (isIntersecting && stale.has(target)) draw(target);
      }),
    { rootMargin: "400px 0px" },
  );
  all(".plot").forEach((plot) => watcher.observe(plot));
  addEventListener("beforeprint", () => all(".plot").forEach(draw));

  function paint() {
    const button = document.getElementById("theme");
    button.textContent = isDark() ? "Light theme" : "Dark theme";
    button.setAttribute("aria-pressed", String(isDark()));
    all(".swatch").forEach((swatch) => { swatch.style.background = `var(--series-${swatch.dataset.run % NUM_COLOURS})`; });
    all(".key").forEach((key) => {
      const index = Number(key.dataset.toggleLine);
      const line = key.querySelector("line");
      line.style.stroke = compares ? "" : `var(--series-${index % NUM_COLOURS})`;
      line.style.strokeDasharray = compares ? SVG_DASHES[index % SVG_DASHES.length] : "";
    });
    redraw();
  }

  function onClick(selector, action) {
    all(selector).forEach((element) => element.addEventListener("click", () => action(element)));
  }
  // Flips membership; the button says what is shown or switched on.
  function flip(set, key, button, pressedMeansIn) {
    if (!set.delete(key)) set.add(key);
    button.setAttribute("aria-pressed", String(set.has(key) === pressedMeansIn));
  }

  onClick("#theme", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered.set(root.dataset.theme);
    paint();
  });
  onClick("[data-axis]", (button) => {
    state.axis = button.dataset.axis;
    all("[data-axis]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    redraw();
  });
  onClick("[data-toggle-run]", (button) => {
    flip(state.hiddenRuns, Number(button.dataset.toggleRun), button, false);
    redraw();
  });
  onClick("[data-toggle-line]", (button) => {
    flip(state.hiddenLines, `${button.dataset.panel} ${button.dataset.toggleLine}`, button, false);
    redraw(all(".plot").filter((plot) => plot.dataset.panel === button.dataset.panel));
  });
  onClick("[data-log]", (button) => {
    flip(state.log, button.dataset.log, button, true);
    redraw(all(".plot").filter((plot) => plot.dataset.panel === button.dataset.log));
  });
  onClick("#drag", (button) => {
    state.drags = !state.drags;
    button.setAttribute("aria-pressed", String(state.drags));
    redraw();
  });
  document.getElementById("smoothing")?.addEventListener("input", ({ target }) => {
    state.smoothing = Number(target.value);
    document.getElementById("smoothing-value").textContent = state.smoothing ? state.smoothing.toFixed(2) : "off";
    redraw();
  });
  const differences = document.getElementById("only-differences");
  const filter = () => document.getElementById("configuration").classList.toggle("only-differences", differences.checked);
  differences?.addEventListener("change", filter);
  if (differences) filter();

  const saved = remembered.get();
  if (saved === "light" || saved === "dark") root.dataset.theme = saved;
  darkPreferred.addEventListener("change", paint);
  paint();
})();
