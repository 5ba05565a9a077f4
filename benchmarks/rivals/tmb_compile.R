# Compile a TMB template: Rscript tmb_compile.R TEMPLATE.cpp FRAMEWORK FLAGS, into the folder of the template.

here <- dirname(sub("^--file=", "", grep("^--file=", commandArgs(FALSE), value = TRUE)))
source(file.path(here, "common.R"))
need("TMB")
arguments <- commandArgs(TRUE)
setwd(dirname(arguments[1]))
status <- TMB::compile(basename(arguments[1]), framework = arguments[2], flags = arguments[3])
quit(status = status)
