"""DVC: the only importer of it, as one long-lived process."""
