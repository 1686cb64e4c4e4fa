"""What has been done, durable, beside the output."""
