"""What the recipes share; no public interface."""
