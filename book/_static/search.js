// A search fetches the pages that it has found, for their excerpts; a book opened from disk may not fetch.
"use strict";

DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol !== "file:";
