"""Graph passes that know Anchor DETR or its plugin ops."""
