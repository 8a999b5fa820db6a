"""From detections to suppressed detections, results files and mAP."""
