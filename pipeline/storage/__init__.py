"""Files, locks and archives on local disks and object stores: errors, retries, redaction."""
