"""An artifact as a web page: `moec web`. Imports no torch."""
