# lme4 or glmmTMB on one task: Rscript lme4.R TASK PACKAGE NAGQ FOLDER. Maximum likelihood: they have no priors.

here <- dirname(sub("^--file=", "", grep("^--file=", commandArgs(FALSE), value = TRUE)))
source(file.path(here, "common.R"))
arguments <- commandArgs(TRUE)
task <- arguments[1]
package <- arguments[2]
points <- as.integer(arguments[3])
folder <- arguments[4]
need(package)
suppressPackageStartupMessages(library(package, character.only = TRUE))

data <- read.csv(file.path(folder, "data.csv"))
# Both packages want a row for each count; the other tasks have their rows already.
if (task == "poisson") {
  data <- data.frame(unit = rep(seq_len(nrow(data)), 3), z = c(data$z1, data$z2, data$z3))
}
formula <- switch(task,
  poisson = z ~ 1 + (1 | unit),
  bernoulli = z ~ x1 + x2 + x3 + (1 | group),
  radon = log_radon ~ floor + (1 | county) + (0 + floor | county)
)
family <- switch(task, poisson = poisson(), bernoulli = binomial())

optimize <- function() {
  if (package == "glmmTMB") {
    return(glmmTMB(formula, data, family, control = glmmTMBControl(parallel = 1)))
  }
  if (task == "radon") return(lmer(formula, data, REML = FALSE))
  # As fast as the default pair of optimizers or faster, and it converges where they do not on these tasks.
  glmer(formula, data, family, control = glmerControl(optimizer = "nloptwrap"), nAGQ = points)
}

# Standard errors of the fixed effects, and the spread of every unit's effect.
standard_errors <- function(model) {
  covariance <- if (package == "glmmTMB") vcov(model)$cond else as.matrix(vcov(model))
  ranef(model, condVar = TRUE)
  sqrt(diag(covariance))
}

fit <- function() {
  fitted <- timed(optimize())
  list(fitted = fitted, errors = timed(standard_errors(fitted$value)))
}

measured <- measure(fit, nrow(data))
fitted <- measured$value$fitted
errors <- measured$value$errors
fixed <- if (package == "glmmTMB") fixef(fitted$value)$cond else fixef(fitted$value)
components <- if (package == "glmmTMB") VarCorr(fitted$value)$cond else VarCorr(fitted$value)
deviations <- vapply(components, function(component) attr(component, "stddev")[[1]], 0)
warned <- if (package == "lme4") fitted$value@optinfo$conv$lme4$messages else fitted$value$fit$message
write_result(folder, list(
  fit_seconds = fitted$wall, se_seconds = errors$wall, cpu_seconds = fitted$cpu + errors$cpu,
  objective = as.numeric(logLik(fitted$value)), peak_mib = measured$peak_mib,
  remark = sprintf(
    "no priors, maximum likelihood%s; fixed %s (SE %s); SD %s; %s",
    if (points > 1) ", its value without constants" else "", toString(signif(fixed, 6)),
    toString(signif(errors$value, 4)), toString(signif(deviations, 6)), toString(warned)
  ),
  versions = versions(package)
))
