// Figures and texts: their libraries are unpacked when one of them comes near the window.
let plotly;
const loadPlotly = async () => {
  const script = document.createElement("script");
  script.textContent = await unpacked(byId("plotly"));
  document.head.append(script);
  return window.Plotly;
};

let figureData;
const drawFigure = async (node) => {
  try {
    const Plotly = await (plotly ??= loadPlotly());
    figureData ??= JSON.parse(byId("figure-data").textContent);
    const { data: traces, layout } = figureData[node.dataset.figure];
    await Plotly.newPlot(node, traces, layout, { responsive: true, displaylogo: false });
    node.dataset.done = "true";
  } catch (error) {
    node.classList.add("failed");
    node.textContent = `This figure cannot be drawn: ${error.message}.`;
  }
};

const drawText = async (node) => {
  const { component, props } = data.texts[node.dataset.text];
  await window.tlCircuits.render(node, component, props);
  node.dataset.done = "true";
};

const near = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    near.unobserve(target);
    (target.dataset.figure ? drawFigure : drawText)(target);
  }
}, { rootMargin: "300px" });
for (const node of document.querySelectorAll("[data-figure], [data-text]")) near.observe(node);
