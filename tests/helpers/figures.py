"""What tests of figures share."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg


def misplaced_texts(figure):
    """Texts that leave the figure or lie on another one."""
    axes = figure.get_axes()
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    texts = [text for a in axes for text in (a.title, a.xaxis.label, a.yaxis.label)]
    for axis, (low, high) in [pair for a in axes for pair in ((a.xaxis, a.get_xlim()), (a.yaxis, a.get_ylim()))]:
        texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    texts += [text for a in axes if a.get_legend() for text in a.get_legend().get_texts()]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    texts += [text for a in axes for text in a.texts]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]
    width, height = figure.bbox.width, figure.bbox.height
    outside = [t for t, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    overlaps = [f"{t} on {other}" for i, (t, box) in enumerate(boxes) for other, its in boxes[:i] if box.overlaps(its)]
    return outside + overlaps
