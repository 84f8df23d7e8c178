"""What makes a conversion cheap."""
