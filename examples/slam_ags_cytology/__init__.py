"""SLAM-AGS: find the few abnormal cells of a slide when only slide labels are known."""
