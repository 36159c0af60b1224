"""The style of all pages: colours as variables for light and dark, and what is narrow stays so.

Text has a contrast of at least 4.5 to 1 with what it stands on, the deepest heat included; series
differ in dash and mark beside their colour, so that no colour has to be told from another.
"""

from __future__ import annotations

LIGHT = {
    "ink": "#1c2024",
    "muted": "#59616b",
    "paper": "#ffffff",
    "panel": "#f5f6f8",
    "line": "#d5dae0",
    "accent": "#0b5cad",
    "heat": "#5fa8e8",
    "series-0": "#0b62b5",
    "series-1": "#b8480a",
    "series-2": "#0f7d59",
    "series-3": "#a03278",
    "series-4": "#7a6400",
    "series-5": "#5a4fc4",
    "series-6": "#4d5761",
}
DARK = {
    "ink": "#e7eaee",
    "muted": "#a3acb7",
    "paper": "#14171b",
    "panel": "#1d2126",
    "line": "#3a414a",
    "accent": "#7db8f5",
    "heat": "#1f659f",
    "series-0": "#6db3f8",
    "series-1": "#f29a5c",
    "series-2": "#52c79a",
    "series-3": "#e58cc2",
    "series-4": "#d6bd4a",
    "series-5": "#aaa2fa",
    "series-6": "#b4bcc6",
}
NUM_SERIES = 7


def _variables(colours: dict[str, str]) -> str:
    return ";".join(f"--{name}:{colour}" for name, colour in colours.items())


_SERIES = "\n".join(f".s{i}{{--c:var(--series-{i})}}" for i in range(NUM_SERIES))

STYLE = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
*{{box-sizing:border-box}}
html{{scroll-behavior:smooth;-webkit-text-size-adjust:100%}}
body{{margin:0 auto;max-width:76rem;padding:1.5rem 1.25rem 4rem;background:var(--paper);
color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:break-word}}
h1{{font-size:1.75rem;line-height:1.2;margin:0 0 .4rem;overflow-wrap:anywhere}}
h2{{font-size:1.3rem;line-height:1.3;margin:0 0 .6rem}}
h3{{font-size:1.05rem;margin:1.4rem 0 .4rem}}
p{{margin:.5rem 0;max-width:48rem}}
ul{{margin:.5rem 0;padding-left:1.3rem;max-width:56rem}}
a{{color:var(--accent)}}
a:focus-visible,[tabindex]:focus-visible,summary:focus-visible{{outline:3px solid var(--accent);
outline-offset:2px}}
.skip{{position:absolute;left:-999rem}}
.skip:focus{{left:1rem;top:.5rem;background:var(--paper);padding:.3rem .6rem}}
.subtitle,.lead,.note,figcaption small{{color:var(--muted)}}
nav{{position:sticky;top:0;z-index:1;background:var(--paper);border-bottom:1px solid var(--line);
margin:1rem 0 0}}
nav ul{{display:flex;gap:.2rem 1.1rem;list-style:none;margin:0;padding:.6rem 0;max-width:none;
overflow-x:auto;white-space:nowrap}}
nav a{{text-decoration:none}}
nav a:hover{{text-decoration:underline}}
section{{padding-top:1.6rem;scroll-margin-top:2.5rem}}
.scroll{{overflow-x:auto;max-width:100%}}
table{{border-collapse:collapse;margin:.6rem 0;font-size:.94rem;font-variant-numeric:tabular-nums}}
caption{{text-align:left;font-weight:600;padding-bottom:.3rem}}
th,td{{padding:.3rem .9rem .3rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}}
th{{font-weight:600}}
tbody th{{font-weight:400;min-width:8rem}}
thead th{{color:var(--muted);white-space:nowrap}}
table:not(.facts) td:last-child:not(.n){{min-width:11rem}}
td.n,th.n{{text-align:right;white-space:nowrap}}
.facts th{{min-width:0;white-space:nowrap;color:var(--muted);font-weight:400}}
.facts td{{overflow-wrap:anywhere}}
pre{{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.7rem .9rem;
overflow-x:auto;font:.9rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
margin:.6rem 0;max-width:100%}}
pre.wrap{{white-space:pre-wrap;overflow-wrap:anywhere}}
code{{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}}
details{{margin:.6rem 0}}
summary{{cursor:pointer;color:var(--accent)}}
.grid{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));
gap:0 2rem;align-items:start}}
.grid>*{{min-width:0}}
figure{{margin:.8rem 0;max-width:40rem}}
figure.wide{{max-width:100%}}
figcaption{{font-weight:600;margin-bottom:.2rem}}
figcaption small{{display:block;font-weight:400}}
.legend{{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:.2rem 0;padding:0;
font-size:.88rem}}
figure svg{{display:block;width:100%;height:auto;font:13px system-ui,sans-serif}}
figure .legend svg{{display:inline-block;width:2rem;height:.8rem;vertical-align:middle;
margin-right:.35rem}}
figure svg.fixed{{width:auto;max-width:none}}
svg text{{fill:var(--ink,currentColor)}}
svg .m{{fill:var(--muted,currentColor)}}
{_SERIES}
.cards{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.8rem;
margin:.8rem 0}}
.card{{background:var(--panel);border:1px solid var(--line);border-radius:.5rem;
padding:.6rem .9rem}}
.card b{{display:block;font-size:1.3rem;line-height:1.3;font-variant-numeric:tabular-nums}}
.card span{{color:var(--muted);font-size:.88rem}}
@media (min-width:60rem){{nav ul{{flex-wrap:wrap}}}}
@media (max-width:40rem){{body{{padding:1rem .9rem 3rem}}h1{{font-size:1.4rem}}
.facts th{{white-space:normal;min-width:5rem}}}}
@media print{{nav,.skip{{display:none}}body{{max-width:none}}}}
"""
