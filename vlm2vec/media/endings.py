"""Which file names are pictures and which are films. Compare in lower case: `name.lower().endswith(PICTURES)`."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FILMS = (".mp4", ".avi", ".mkv", ".webm", ".mov")
ANIMATED_PICTURES = (".gif",)  # a film where one is asked for; anywhere else a picture, their first frame
# Pictures that browsers show as they are, with the name of their type: `data:image/NAME`.
SHOWN_BY_BROWSERS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif", ".webp": "webp"}
