"""Models and query strategies that are not part of al-pipeline: named in `params.yaml`, found, trusted, checked."""
