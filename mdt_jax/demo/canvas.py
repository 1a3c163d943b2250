"""The canvas on which a user brushes over a picture, as a component of the page.

The value of the component is {"image": data URL of the picture, "mask": data URL of the
strokes, "width": W, "height": H}; both PNGs have W x H pixels. The page sets "image";
each stroke sets "mask".
"""

from __future__ import annotations

TEMPLATE = """
<div class="brush">
  <canvas class="picture" aria-label="picture to brush over"></canvas>
  <canvas class="strokes" aria-label="brush strokes"></canvas>
  <p class="empty">Upload a picture, or draw one first.</p>
</div>
<div class="tools">
  <label>Brush <input class="size" type="range" min="8" max="120" value="44"
    aria-label="brush size"></label>
  <button type="button" class="clear">Clear</button>
</div>
"""

CSS = """
.brush { position: relative; width: 100%; max-width: 420px; aspect-ratio: 1;
  border-radius: 12px; overflow: hidden; touch-action: none;
  background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); }
.brush canvas { position: absolute; inset: 0; width: 100%; height: 100%; }
.brush .picture { image-rendering: pixelated; }
.brush .strokes { opacity: .6; cursor: crosshair; }
.brush .empty { position: absolute; inset: 0; display: flex; align-items: center;
  justify-content: center; pointer-events: none;
  color: var(--body-text-color-subdued); }
.tools { display: flex; gap: 16px; align-items: center; margin-top: 8px;
  max-width: 420px; color: var(--body-text-color); }
.tools label { display: flex; gap: 8px; align-items: center; flex: 1; }
.tools .size { flex: 1; }
.tools .clear { padding: 4px 12px; border-radius: 8px; cursor: pointer;
  color: var(--body-text-color); background: var(--button-secondary-background-fill);
  border: 1px solid var(--border-color-primary); }
"""

# Strokes are drawn on a large canvas. A smaller copy, of the size of the picture, is
# sent to the server when a stroke ends.
SCRIPT = """
const box = element.querySelector('.brush');
const picture = box.querySelector('.picture');
const strokes = box.querySelector('.strokes');
const empty = box.querySelector('.empty');
const size = element.querySelector('.size');
const SIDE = 420;
let shown = null, last = null;

function clear() {
  const value = props.value || {};
  const wide = value.width >= value.height;
  const ratio = value.width ? value.height / value.width : 1;
  strokes.width = wide ? SIDE : Math.round(SIDE / ratio);
  strokes.height = wide ? Math.round(SIDE * ratio) : SIDE;
  box.style.aspectRatio = `${strokes.width} / ${strokes.height}`;
}
function show() {
  const value = props.value || {};
  if (value.image === shown) return;
  shown = value.image;
  clear();
  empty.style.display = shown ? 'none' : 'flex';
  if (!shown) return;
  const image = new Image();
  image.onload = () => {
    picture.width = image.width;
    picture.height = image.height;
    picture.getContext('2d').drawImage(image, 0, 0);
  };
  image.src = shown;
}
function place(event) {
  const at = strokes.getBoundingClientRect();
  return [(event.clientX - at.left) * strokes.width / at.width,
          (event.clientY - at.top) * strokes.height / at.height];
}
function line(from, to) {
  const pen = strokes.getContext('2d');
  pen.strokeStyle = '#ef4444';
  pen.lineWidth = Number(size.value);
  pen.lineCap = 'round';
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(to[0] + 0.01, to[1]);
  pen.stroke();
}
function send() {
  const value = props.value || {};
  if (!value.width) return;
  const small = document.createElement('canvas');
  small.width = value.width;
  small.height = value.height;
  const pen = small.getContext('2d');
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(strokes, 0, 0, small.width, small.height);
  props.value = { ...value, mask: small.toDataURL('image/png') };
  trigger('change');
}
strokes.addEventListener('pointerdown', (event) => {
  if (!shown) return;
  strokes.setPointerCapture(event.pointerId);
  last = place(event);
  line(last, last);
});
strokes.addEventListener('pointermove', (event) => {
  if (!last) return;
  const to = place(event);
  line(last, to);
  last = to;
});
strokes.addEventListener('pointerup', () => { if (last) { last = null; send(); } });
element.querySelector('.clear').addEventListener('click', () => { clear(); send(); });
watch('value', show);
show();
"""
