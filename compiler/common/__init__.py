"""What every package of moec uses: errors, rejections, files written atomically, and the JSON files of a model."""
