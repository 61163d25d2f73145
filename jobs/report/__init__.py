"""Pages and pictures for people.

`html` writes pages and charts, `pictures` draws codes and predictions, `drawing` the quickstart's images;
`findings` opens what a run left behind, `sections` show it, `codebook` shows what codes stand for.
"""
