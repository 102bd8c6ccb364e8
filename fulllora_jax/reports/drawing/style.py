"""The style of pages and pictures: light, dark and print, from 360 px up.

The colours of series are told apart by people of any colour vision (after
Okabe and Ito, 2008), here darkened for white and lightened for black until
each has a contrast of 4.5 or more with its ground.
"""

_COLOURS = {  # on white, on black
  'ground': ('#ffffff', '#14171b'),
  'panel': ('#f5f6f8', '#1d2127'),
  'ink': ('#1b1f24', '#e7eaee'),
  'soft': ('#57606a', '#a5adb7'),
  'line': ('#d5d9de', '#383f48'),
  'clean': ('#0068a5', '#62b5ee'),
  'robust': ('#b84a00', '#ff9a5c'),
  'base': ('#6a6f76', '#a4abb4'),
  'third': ('#00735a', '#3fc7a0'),
  'fourth': ('#9a3c78', '#e794ca'),
  'fifth': ('#7c6200', '#dcc04f'),
  'good': ('#00735a', '#3fc7a0'),
  'bad': ('#b3261e', '#ff8a80'),
}
# In place of those on white, where ink costs.
_ON_PAPER = {'panel': '#ffffff', 'ink': '#000000', 'soft': '#444444', 'line': '#bbbbbb'}
_LIGHT = {name: colours[0] for name, colours in _COLOURS.items()}
_DARK = {name: colours[1] for name, colours in _COLOURS.items()}


def _root(scheme: str, colours: dict[str, str]) -> str:
  names = ' '.join(f'--{name}: {value};' for name, value in colours.items())
  return f':root {{ color-scheme: {scheme}; {names} }}\n'


_SCHEMES = (
  _root('light dark', _LIGHT)
  + '@media (prefers-color-scheme: dark) {\n'
  + _root('light dark', _DARK)
  + '}\n'
)
_DRAWINGS = """
svg text {
  font: 13px system-ui, -apple-system, "Segoe UI", sans-serif;
  fill: var(--soft);
}
svg text.strong { fill: var(--ink); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg .mark { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 3; }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; }
svg .line { stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-width: 1.4; opacity: .65; }
svg .dashed { stroke-dasharray: 6 4; }
svg .dotted { stroke-dasharray: 1 5; }
svg .fill { fill: currentColor; }
svg .band { fill: currentColor; opacity: .15; }
svg .hollow { fill: var(--ground); stroke: currentColor; stroke-width: 1.6; }
svg .span { stroke: currentColor; stroke-width: 2; }
.c-clean { color: var(--clean); } .c-robust { color: var(--robust); }
.c-base { color: var(--base); } .c-third { color: var(--third); }
.c-fourth { color: var(--fourth); } .c-fifth { color: var(--fifth); }
.good { color: var(--good); } .bad { color: var(--bad); }
svg text.good, svg text.bad { fill: currentColor; }
.pixels { image-rendering: pixelated; }
"""

# The style sheet of a picture in a file of its own.
PICTURE = (
  _SCHEMES
  + _DRAWINGS
  + """
svg .ground { fill: var(--ground); }
svg text.small { font-size: 12px; }
svg text.title { font-size: 15px; font-weight: 600; fill: var(--ink); }
"""
)

# The style sheet of a page.
PAGE = (
  _SCHEMES
  + _DRAWINGS
  + """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: anywhere;
}
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 28px; }
footer { padding: 16px 16px 40px; color: var(--soft); font-size: 14px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 20px; line-height: 1.3; margin: 36px 0 8px; }
h3 { font-size: 15px; line-height: 1.3; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 72ch; }
.note { color: var(--soft); font-size: 14px; }
.warning { border-left: 4px solid var(--bad); padding-left: 12px; }
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 8px; top: 8px; background: var(--ground); padding: 8px; }
a { color: var(--clean); }
:focus-visible { outline: 2px solid var(--clean); outline-offset: 2px; }
nav ul {
  display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; margin: 0;
  list-style: none; font-size: 14px;
}
.cards, .charts, .columns, .examples {
  display: grid; gap: 16px; margin: 12px 0 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--w)), 1fr));
}
.charts { --w: 400px; }
.columns { --w: 160px; }
.examples { --w: 235px; }
.cards {
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr));
}
.card { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
.card dt { color: var(--soft); font-size: 14px; }
.card dd { margin: 0; }
.card .number { font-size: 28px; font-weight: 650; line-height: 1.25; }
.card .small { color: var(--soft); font-size: 14px; }
dl.cards { padding: 0; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figcaption { font-size: 14px; color: var(--soft); }
.single { max-width: 560px; }
.box { overflow-x: auto; margin: 8px 0 12px; }
table {
  border-collapse: collapse; font-size: 14px; overflow-wrap: normal;
  font-variant-numeric: tabular-nums;
}
th, td {
  padding: 5px 14px 5px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line);
}
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
table.facts { width: 100%; }
table.facts th, table.facts td {
  text-align: left; white-space: normal; vertical-align: top;
  overflow-wrap: anywhere; padding-right: 12px;
}
table.facts th { font-weight: 400; color: var(--soft); width: 38%; }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 4px 0; }
code {
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
svg { display: block; width: 100%; height: auto; overflow: visible; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none;
  margin: 4px 0 0; padding: 0; font-size: 13px;
}
.legend li { display: flex; align-items: center; gap: 6px; }
.legend svg { width: 26px; height: 12px; flex: none; }
.example { background: var(--panel); border-radius: 8px; padding: 10px; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: 6px; }
.trio img { width: 100%; height: auto; display: block; background: #808080; }
.trio div { font-size: 12.5px; line-height: 1.35; }
.trio span { color: var(--soft); display: block; }
"""
  + '@media print {\n'
  + _root('light', _LIGHT | _ON_PAPER)
  + """
  nav, .skip { display: none; }
  .box { overflow: visible; }
  .card, .example { border: 1px solid var(--line); break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
)
