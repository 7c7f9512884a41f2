"""What the recipes share. This is no public interface: it changes whenever a recipe needs it to."""
