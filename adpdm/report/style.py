"""Colours, style sheet and tooltip script of the report."""

from __future__ import annotations

# Surface, text and mark colours of both schemes. Text on the page and on cards has at least 4.5:1, marks 3:1;
# python_tests/test_report.py checks it.
LIGHT = {
    "page": "#fbfbfa",
    "card": "#ffffff",
    "ink": "#1b1c1e",
    "muted": "#5e6167",
    "line": "#e3e3e0",
    "accent": "#2f5bd0",
    "mark": "#8b8e95",
}
DARK = {
    "page": "#141517",
    "card": "#1b1d20",
    "ink": "#ececea",
    "muted": "#a2a5ab",
    "line": "#303338",
    "accent": "#8fb0ff",
    "mark": "#7d8188",
}
SERIES_LIGHT = ("#2f5bd0", "#b4500b", "#18796a", "#9a3fa8", "#6b6e75")
SERIES_DARK = ("#8fb0ff", "#f2a45f", "#5fcfb6", "#dba0ee", "#a2a5ab")

# Groups: found by a search for eight colours whose smallest distance in OKLab is largest, as seen with normal
# vision, protanopia, deuteranopia and tritanopia (Machado 2009). It is 0.14; Okabe and Ito's eight have 0.03.
GROUP_COLOURS = ("#6e44ab", "#b687fb", "#b3d0ff", "#3c8484", "#4fb89f", "#f2c72e", "#e47d14", "#a62a13")


def group_colours(num_groups: int) -> list[str]:
    """One colour per group; more than eight are blended along the eight, since they then follow the time."""
    count = len(GROUP_COLOURS)
    if num_groups <= count:
        return list(GROUP_COLOURS[:num_groups])
    stops = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in GROUP_COLOURS]
    colours = []
    for g in range(num_groups):
        place = g * (count - 1) / (num_groups - 1)
        low = min(int(place), count - 2)
        mixed = [round(a + (b - a) * (place - low)) for a, b in zip(stops[low], stops[low + 1], strict=True)]
        colours.append("#" + "".join(f"{v:02x}" for v in mixed))
    return colours


def _variables(scheme: dict[str, str], series: tuple[str, ...]) -> str:
    pairs = [*scheme.items(), *((f"series-{i}", colour) for i, colour in enumerate(series))]
    return "".join(f"--{name}:{colour};" for name, colour in pairs)


def style_sheet() -> str:
    """The whole CSS."""
    series = "".join(f".s{i}{{--c:var(--series-{i})}}" for i in range(len(SERIES_LIGHT)))
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT, SERIES_LIGHT)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK, SERIES_DARK)}}}}}" + series + _RULES
    )


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.6 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer{max-width:1288px;margin:0 auto;padding:0 24px}
header{padding-top:72px}
.eyebrow{margin:0 0 12px;color:var(--muted);font-size:13px;letter-spacing:.08em;text-transform:uppercase}
h1{margin:0;font-size:clamp(28px,4vw,42px);line-height:1.15;font-weight:650;letter-spacing:-.02em;text-wrap:balance}
h2{margin:0 0 8px;font-size:24px;line-height:1.3;font-weight:650;letter-spacing:-.012em}
h3{margin:40px 0 14px;font-size:17px;line-height:1.4;font-weight:600}
h3 span{color:var(--muted);font-weight:400}
p{margin:0 0 12px;max-width:76ch;text-wrap:pretty}
.lead{margin-top:16px;font-size:18px;color:var(--muted)}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:3px}
nav{margin:32px 0 0;padding:14px 0;border-block:1px solid var(--line);font-size:14px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 24px;margin:0;padding:0;list-style:none}
nav a{color:var(--muted);text-decoration:none}
nav a:hover{color:var(--ink);text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:1px;margin:36px 0 0;
background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.tiles div{box-shadow:0 0 0 1px var(--line);padding:18px 20px}
.tiles dt{color:var(--muted);font-size:13px}
.tiles dd{margin:2px 0 0;font-size:27px;font-weight:600;letter-spacing:-.02em;line-height:1.25}
.tiles dd small{display:block;margin-top:2px;color:var(--muted);font-size:12.5px;font-weight:400;
letter-spacing:0;line-height:1.45}
section{padding:64px 0 0}
section>p:first-of-type{color:var(--muted)}
figure{margin:24px 0 0}
figcaption{margin-top:12px;max-width:88ch;color:var(--muted);font-size:14px;line-height:1.55}
figcaption b{color:var(--ink);font-weight:600}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:20px 20px 14px}
.scroll{overflow-x:auto;overscroll-behavior-x:contain}
.tall{max-height:80vh;overflow-y:auto}
.scroll:focus-visible,.flip:focus-visible,summary:focus-visible,a:focus-visible{
outline:2px solid var(--accent);outline-offset:3px;border-radius:3px}
.panels{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:28px}
.panels h4{margin:0 0 8px;color:var(--muted);font-size:13.5px;font-weight:400}
.flip{position:relative;width:fit-content;max-width:100%;cursor:ew-resize}
.flip img+svg{position:absolute;inset:0;opacity:0}
.flip:hover img+svg,.flip:focus img+svg{opacity:1}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:24px}
.pair figure{margin:0}
svg{display:block;width:100%;height:auto;font-size:11.5px;font-variant-numeric:tabular-nums}
.panels img,.panels svg{display:block;max-width:100%;height:auto;image-rendering:pixelated;border-radius:4px}
svg text{fill:var(--muted)}
svg .name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:10.5px}
svg .strong{fill:var(--ink);font-weight:600}
svg .label{fill:var(--ink)}
svg .title{fill:var(--ink);font-weight:600;font-size:12.5px}
svg .grid{stroke:var(--line);stroke-width:1}
svg .base{stroke:var(--mark);stroke-width:1}
svg .curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .dash{stroke-dasharray:5 4}
svg .fill{fill:var(--c)}
svg .dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}
svg .whisker{stroke:var(--c);stroke-width:2;stroke-linecap:round}
svg .inkline{fill:none;stroke:var(--ink);stroke-width:1.5;stroke-linejoin:round}
svg .shared{stroke:var(--muted);stroke-width:1.2;stroke-dasharray:2 4}
svg .hot{fill:transparent}
svg .hot:hover{fill:var(--ink);fill-opacity:.06}
svg .heat{fill:var(--accent)}
svg .cell:hover,svg .heat:hover{stroke:var(--ink);stroke-width:1.5}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin:0 0 14px;padding:0;list-style:none;color:var(--muted);
font-size:13px}
.legend li{display:flex;align-items:center;gap:7px}
.legend i{width:14px;height:14px;border-radius:3px;background:var(--c)}
.legend i.line{height:0;border-radius:0;background:none;border-top:2.5px solid var(--c);width:22px}
.legend i.dashed{border-top-style:dashed}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums;line-height:1.45}
th,td{padding:8px 14px 8px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:last-child,td:last-child{padding-right:2px}
th{color:var(--muted);font-weight:500;font-size:13px;vertical-align:bottom}
td.text,th.text{text-align:left;white-space:normal}
th.row{color:var(--ink);font-size:14px;font-weight:400;text-align:left}
tr.split>*{border-top:2px solid var(--line)}
tr.best td,tr.best th{font-weight:600}
table.wide td.text{overflow-wrap:anywhere}
details{margin-top:10px;font-size:14px}
summary{width:fit-content;color:var(--muted);cursor:pointer}
details[open] summary{margin-bottom:10px}
pre,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:13.5px}
pre{margin:16px 0;padding:16px 18px;background:var(--card);border:1px solid var(--line);border-radius:10px;
white-space:pre-wrap;overflow-wrap:anywhere}
.absent{margin-top:16px;padding:12px 16px;border-left:3px solid var(--line);color:var(--muted);font-size:15px}
ul.notes{max-width:76ch;margin:16px 0 0;padding-left:20px}
ul.notes li{margin-bottom:8px}
footer{padding-block:72px 48px;color:var(--muted);font-size:13px}
#tip{position:fixed;z-index:9;max-width:320px;padding:7px 10px;border-radius:6px;background:var(--ink);
color:var(--page);font-size:12.5px;line-height:1.45;white-space:pre-line;pointer-events:none;opacity:0;
font-variant-numeric:tabular-nums}
@media(max-width:760px){header{padding-top:40px}section{padding-top:48px}.panels{grid-template-columns:1fr}
.panels h4{margin-top:4px}.scroll>svg{min-width:720px}.pair .scroll>svg{min-width:440px}}
@media print{body{background:#fff}section{break-inside:avoid-page}#tip{display:none}}
"""

# Shows the data-tip text of what is under the pointer; without it the tables below the figures say the same.
SCRIPT = """
(()=>{const tip=document.getElementById("tip");
addEventListener("pointermove",e=>{const t=e.target.closest&&e.target.closest("[data-tip]");
if(!t){tip.style.opacity=0;return}
tip.textContent=t.dataset.tip;tip.style.opacity=1;
const b=tip.getBoundingClientRect();
tip.style.left=Math.max(4,Math.min(e.clientX+14,innerWidth-b.width-8))+"px";
tip.style.top=(e.clientY+18+b.height>innerHeight?e.clientY-b.height-12:e.clientY+18)+"px"});
addEventListener("scroll",()=>{tip.style.opacity=0},{passive:true})})();
"""
