"""What every room uses: errors, rejections, files that appear whole or not at all, the JSON files of a model."""
