# TMB on one task: Rscript tmb.R TASK MODE FOLDER LIBRARY
#
# FOLDER holds data.csv. LIBRARY is the compiled template without its suffix; tmb_compile.R makes it. MODE is "fit", or
# "nll" to evaluate the negative log joint density, nothing integrated out, at the rows of points.csv.

here <- dirname(sub("^--file=", "", grep("^--file=", commandArgs(FALSE), value = TRUE)))
source(file.path(here, "common.R"))
need("TMB")
suppressPackageStartupMessages(library(TMB))
arguments <- commandArgs(TRUE)
task <- arguments[1]
mode <- arguments[2]
folder <- arguments[3]
library_path <- arguments[4]
dyn.load(dynlib(library_path))
invisible(openmp(1))

data <- read.csv(file.path(folder, "data.csv"))

# Data, starting values and random effects as the template of each task has them; everything starts at zero.
setup <- switch(task,
  poisson = list(
    data = list(z = as.matrix(data)),
    parameters = list(mu = 0, log_tau = 0, y = rep(0, nrow(data))),
    random = "y"
  ),
  bernoulli = list(
    data = list(x = cbind(1, data$x1, data$x2, data$x3), z = data$z, group = data$group - 1L),
    parameters = list(beta = rep(0, 4), log_tau = 0, u = rep(0, max(data$group))),
    random = "u"
  ),
  radon = list(
    data = list(county = as.integer(data$county) - 1L, floor = data$floor, log_radon = data$log_radon),
    parameters = list(
      mu_alpha = 0, mu_beta = 0, log_sigma_alpha = 0, log_sigma_beta = 0, log_sigma_y = 0,
      alpha = rep(0, max(data$county)), beta = rep(0, max(data$county))
    ),
    random = c("alpha", "beta")
  ),
  eight_schools = list(
    data = list(y = data$y, sigma = data$sigma),
    parameters = list(mu = 0, log_tau = 0, theta = rep(0, nrow(data))),
    random = "theta"
  )
)
rm(data)

make <- function(random) {
  MakeADFun(setup$data, setup$parameters, random = random, DLL = basename(library_path), silent = TRUE)
}

evaluate_points <- function() {
  joint <- make(NULL)
  points <- as.matrix(read.csv(file.path(folder, "points.csv"), header = FALSE))
  nll <- apply(points, 1, function(point) joint$fn(unname(point)))
  writeLines(sprintf("%.17g", nll), file.path(folder, "nll.csv"))
}

fit <- function() {
  made <- timed(make(setup$random))
  objective <- made$value
  control <- list(eval.max = 1000, iter.max = 1000)
  optimized <- timed(nlminb(objective$par, objective$fn, objective$gr, control = control))
  list(made = made, optimized = optimized, reported = timed(sdreport(objective)))
}

# What nlminb leaves: it stops where values agree to ten digits, and an optimum is known to half as many. Not timed.
polish <- function(objective, par) {
  for (step in 1:2) par <- par - solve(optimHess(par, objective$fn, objective$gr), as.vector(objective$gr(par)))
  sdreport(objective, par.fixed = par)
}

save <- function(made, optimized, reported, peak_mib) {
  optimum <- optimized$value
  report <- polish(made$value, optimum$par)
  left <- max(abs(report$par.fixed - optimum$par) / sqrt(diag(report$cov.fixed)))
  # TMB keeps one random vector; in all templates it is the local sites one after the other.
  write_estimates(folder, "global", report$par.fixed, sqrt(diag(report$cov.fixed)))
  write_estimates(folder, "local", report$par.random, sqrt(report$diag.cov.random))
  write_result(folder, list(
    setup_seconds = made$wall, fit_seconds = optimized$wall, se_seconds = reported$wall,
    cpu_seconds = made$cpu + optimized$cpu + reported$cpu,
    steps = optimum$iterations, objective = -optimum$objective, peak_mib = peak_mib,
    remark = sprintf(
      paste(
        "CPU: MakeADFun %.3g s, nlminb %.3g s, sdreport %.3g s; pdHess %s; %d values and %d gradients; nlminb: %s;",
        "it ended %.1e standard errors from the optimum, to which the estimates were polished untimed"
      ),
      made$cpu, optimized$cpu, reported$cpu, report$pdHess, optimum$evaluations[["function"]],
      optimum$evaluations[["gradient"]], optimum$message, left
    ),
    versions = versions(c("TMB", "Matrix"))
  ))
}

if (mode == "nll") {
  evaluate_points()
} else {
  measured <- measure(fit, length(unlist(setup$parameters[setup$random])))
  do.call(save, c(measured$value, peak_mib = measured$peak_mib))
}
