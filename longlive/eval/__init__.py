"""What generated videos are judged by."""
