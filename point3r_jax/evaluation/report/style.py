"""How the HTML report looks, in light and in dark."""

CSS = """\
:root {
  color-scheme: light dark;
  --ink: #222222; --faint: #6e6e6e; --rule: #d9d9d9; --accent: #b4361c;
  --page: #ffffff; --shade: #f5f4f2; --warn: #fbe9d5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e6e6; --faint: #a0a0a0; --rule: #3d3d3d; --accent: #ff8f6e;
    --page: #181818; --shade: #222222; --warn: #4a3218;
  }
}
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { margin: 0; font-size: 26px; line-height: 1.25; }
h2 { margin: 40px 0 8px; font-size: 19px; }
h3 { margin: 24px 0 4px; font-size: 15px; }
p { margin: 4px 0; }
.note, figcaption, .scale { color: var(--faint); font-size: 13px; }
.warning {
  margin: 12px 0; padding: 8px 12px; background: var(--warn);
  border-left: 4px solid var(--accent); font-weight: 600;
}
.wide { overflow-x: auto; }
.long { max-height: 640px; overflow: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px; border-bottom: 1px solid var(--rule); }
th { text-align: left; font-weight: 600; }
td { text-align: right; white-space: nowrap; }
td.text { text-align: left; }
td.fact { text-align: left; white-space: normal; overflow-wrap: anywhere; }
thead th { position: sticky; top: 0; background: var(--page); }
thead th.number { text-align: right; }
tr.ours { background: var(--shade); }
tr.out { color: var(--faint); }
.facts th { font-weight: 400; color: var(--faint); vertical-align: top; }
.plots {
  display: grid; gap: 16px 24px;
  grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr));
}
.clouds { display: grid; gap: 16px; }
.pictures {
  display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr));
}
figure { margin: 0; overflow-wrap: anywhere; }
figure img { display: block; width: 100%; border-radius: 2px; }
figure img.bar { height: 8px; margin-top: 4px; }
.scale { display: flex; justify-content: space-between; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif !important; }
summary { cursor: pointer; margin: 8px 0; }
"""
