from fastapd.compat._apd_patch import patch, unpatch
