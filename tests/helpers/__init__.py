"""What tests share: tiny models and datasets, small runs, fake servers, and ways to fail."""
