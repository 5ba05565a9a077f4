# Shared by the R rivals: what is installed, times, peak memory, and the files that Python reads.

# Stop with a line that r_rivals.py knows, if a package is missing.
need <- function(packages) {
  for (package in packages) {
    if (!requireNamespace(package, quietly = TRUE)) {
      message("not installed: R package ", package)
      quit(status = 3)
    }
  }
}

# Seconds of a clock, and of the processor, that an expression takes; its value.
timed <- function(expression) {
  before <- proc.time()
  value <- force(expression)
  spent <- proc.time() - before
  list(value = value, wall = spent[["elapsed"]], cpu = spent[["user.self"]] + spent[["sys.self"]])
}

# A line of /proc/self/status in MiB; NA where there is none (not Linux).
status_mib <- function(key) {
  if (!file.exists("/proc/self/status")) return(NA)
  line <- grep(paste0("^", key), readLines("/proc/self/status"), value = TRUE)
  as.numeric(gsub("[^0-9]", "", line)) / 1024
}

# Forget the peak of reading the data; the memory in use then.
reset_peak <- function() {
  invisible(gc())
  try(cat("5", file = "/proc/self/clear_refs"), silent = TRUE)
  status_mib("VmRSS")
}

# What a fit returns, and the peak memory that the first one adds. Small fits are done twice and the second one counts:
# the first is slowed down by R, which compiles its own functions in their first calls, and this is no part of it.
measure <- function(fit, size, small = 10000) {
  before <- reset_peak()
  value <- fit()
  peak_mib <- status_mib("VmHWM") - before
  if (size <= small) value <- fit()
  list(value = value, peak_mib = peak_mib)
}

# A row of "key,value" for each element.
write_result <- function(folder, result) {
  text <- vapply(result, function(x) if (is.numeric(x)) sprintf("%.17g", x) else as.character(x), "")
  write.csv(data.frame(key = names(result), value = unname(text)), file.path(folder, "result.csv"), row.names = FALSE)
}

write_estimates <- function(folder, name, loc, se) {
  write.csv(data.frame(loc = as.numeric(loc), se = as.numeric(se)), file.path(folder, paste0(name, ".csv")),
            row.names = FALSE)
}

versions <- function(packages) {
  named <- vapply(packages, function(p) paste(p, as.character(packageVersion(p))), "")
  paste(c(paste("R", getRversion()), named), collapse = "; ")
}
