# eiPack's multinomial-Dirichlet model: Rscript ecological.R INPUT.csv OUTPUT DRAWS BURNIN THIN SEED COVARIATE
# INPUT has columns n_* (voters by race), v_* (votes by choice) and x; COVARIATE is "x" or "none".
# OUTPUT.bin gets the draws of the rates (doubles, a draw after the other), OUTPUT.txt the names of their columns, seconds
# of tuning and sampling, and the least effective size of the cell counts.
suppressMessages({library(eiPack); library(coda)})
args <- commandArgs(trailingOnly = TRUE)
data <- read.csv(args[1])
sizes <- as.integer(args[3:5])
set.seed(as.integer(args[6]))
voters <- grep("^n_", names(data), value = TRUE)
votes <- grep("^v_", names(data), value = TRUE)
formula <- as.formula(sprintf("cbind(%s) ~ cbind(%s)", paste(votes, collapse = ","), paste(voters, collapse = ",")))
covariate <- if (args[7] == "none") NULL else as.formula(paste("~", args[7]))
seconds <- function(expression) system.time(expression)[["elapsed"]]
tuning <- seconds(tune <- tuneMD(formula, covariate = covariate, data = data, ntunes = 10, totaldraws = 10000))
sampling <- seconds(
  found <- ei.MD.bayes(formula, covariate = covariate, data = data, tune.list = tune, sample = sizes[1],
                       burnin = sizes[2], thin = sizes[3], ret.beta = "r", ret.mcmc = TRUE)
)
beta <- found$draws$Beta
writeBin(as.double(t(beta)), paste0(args[2], ".bin"))
least <- min(effectiveSize(found$draws$Cell.counts))
writeLines(c(colnames(beta), sprintf("%g %g %g", tuning, sampling, least)), paste0(args[2], ".txt"))
